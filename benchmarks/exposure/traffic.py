"""Traffic as a server meets it: image questions and text chats, which come and end at any time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from PIL.Image import Image

from benchmarks.geo3k import INSTRUCTION
from benchmarks.geo3k_nano import questions
from benchmarks.geo3k_nano.drawing import TILE, TILES
from vllm_deepstack.check.probes import IDLE
from vllm_deepstack.check.stepping import Joining

from . import streams
from .streams import STREAMS

ARRIVALS = ("poisson", "lock-step", *STREAMS)
LENGTHS, MEAN = (4, 44), 24  # tokens of an answer
WORDS = (10, 200)  # tokens of a text chat
ORDINARY = (20, 300)  # tokens that are text in any vocabulary, the tiny models' too
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Cell:
    """Traffic of one kind. What is asked does not depend on how many are in flight."""

    arrivals: str
    in_flight: int
    """Requests: the mean, or in lock-step as many as join at once; 0 of a stream of the tests."""
    share: float
    """Of requests that have an image."""
    side: int = 0
    """Pixels of an image's longer side, at most; 0: Geo3K-nano's own, of 25 to 49 tokens."""
    requests: int = 260
    system: int = 0
    """Tokens of a system prompt with which all begin."""
    seed: int = 0
    omni: bool = False
    """Of the tests' streams: whether none may end in a placeholder."""

    def __str__(self) -> str:
        if self.arrivals in STREAMS:
            return STREAMS[self.arrivals]
        size = f"images of up to {self.side} px" if self.side else "small images"
        system = f", system prompt of {self.system}" if self.system else ""
        return f"{self.share:.0%} {size}, {self.arrivals}{system}"


@dataclass(frozen=True)
class Request:
    number: int
    image: bool
    max_tokens: int
    joins_after: int
    """Engine steps after the request before it."""


def requests(cell: Cell) -> list[Request]:
    if cell.arrivals in STREAMS:
        sent = streams.sent(cell.arrivals, cell.omni)
        return [
            Request(number, streams.has_image(each), each.max_tokens, each.joins_after)
            for number, each in enumerate(sent)
        ]
    content = np.random.default_rng(cell.seed)
    images = content.permutation(cell.requests) < round(cell.share * cell.requests)
    lengths = content.integers(*LENGTHS, cell.requests, endpoint=True)
    arrivals = np.random.default_rng((cell.seed, cell.in_flight))
    gaps = arrivals.exponential(MEAN / cell.in_flight, cell.requests)
    # Whole steps of the sums: sums of whole steps would come too early.
    after = np.diff(np.floor(gaps.cumsum()).astype(int), prepend=0)
    if cell.arrivals == "lock-step":
        # Evenly, so that those who join together have an image among them.
        images = np.diff(np.floor(np.arange(cell.requests + 1) * cell.share + 1e-9)) > 0
        lengths[:] = MEAN
        after = np.where(np.arange(cell.requests) % cell.in_flight, 0, IDLE)
    columns = (images.tolist(), lengths.tolist(), after.tolist())
    return [Request(number, *row) for number, row in enumerate(zip(*columns))]


def joining(cell: Cell, tokenizer: Any) -> list[Joining]:
    """As `step_through` serves them."""
    if cell.arrivals in STREAMS:
        return streams.joining(cell.arrivals, cell.omni, tokenizer)
    sent = requests(cell)
    return [Joining(partial(prompt, cell, r, tokenizer), r.max_tokens, r.joins_after) for r in sent]


def prompt(cell: Cell, request: Request, tokenizer: Any) -> dict[str, Any]:
    """As vLLM takes it: token ids, in which one token stands for the image."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    random = np.random.default_rng((cell.seed, request.number, 1))
    ids: list[int] = []
    if cell.system:
        common = words(np.random.default_rng(cell.seed), cell.system)
        ids += [*encode("<|im_start|>system\n"), *common, *encode("<|im_end|>\n")]
    if not request.image:
        asked = words(random, int(random.integers(*WORDS, endpoint=True)))
        return {"prompt_token_ids": [*ids, *encode(USER), *asked, *encode(ASSISTANT)]}
    image, question = figure(cell.seed, request.number)
    if cell.side:
        # From Geo3K-nano's largest on: some fit into a graph and some do not.
        side = int(random.integers(min(TILES[1] * TILE, cell.side), cell.side, endpoint=True))
        image = image.resize([round(side * each / max(image.size)) for each in image.size])
    ids += encode(f"{USER}{IMAGE}{question} {INSTRUCTION}{ASSISTANT}")
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": [image]}}


def words(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(*ORDINARY, count).tolist()


@cache
def figure(seed: int, number: int) -> tuple[Image, str]:
    """A figure of Geo3K-nano's test split, and what is asked of it."""
    _, image, problem = questions.question("test", seed, number)
    return image, problem.removeprefix("<image>")
