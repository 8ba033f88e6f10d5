"""Short requests by which the check finds leaks: each alone, and after or beside others' media."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from .compare import compare
from .samples import drawing
from .stepping import Joining, RefusedError, Served, chunks, flush, step_through

IDLE = 10**6
"""Steps: more than any request takes, so that it joins when all have ended."""
OVERLAPPING = 2
LONGEST = 1024
"""Tokens of a medium that goes through the decoder one token a step."""
SAMPLE_RATE = 16_000
Rows = list[dict[str, Any]]
"""Of a stream: each request, and how far it is from the same request alone."""
PROSE = """\
A triangle has three sides and three angles, and the angles add up to one hundred and eighty
degrees. Where two sides are equal, so are the angles that face them. A circle is all points that
are as far from its center as its radius says; a line that meets it in one point only stands at a
right angle to the radius there. Which of these facts helps depends on what is given and on what
is asked: read the question twice, draw what it says, and write down what follows from it.
"""


@dataclass(frozen=True)
class Probe:
    words: int
    """Tokens of text, before the medium if there is one."""
    seed: int
    medium: int | None = None
    max_tokens: int = 1
    joins_after: int = field(default=IDLE, compare=False)
    judged: bool = True
    modality: str = ""
    """Of the medium."""
    adapter: str = ""
    grammar: bool = False


class Prompts:
    """What an engine is sent for probes: text, and the media that the model takes."""

    def __init__(self, llm: Any, blank: bool = False):
        self.blank = blank
        self.tokenizer = llm.get_tokenizer()
        self.words = self.tokenizer.encode(PROSE, add_special_tokens=False)
        self.placeholders = placeholders(llm.llm_engine.vllm_config.model_config)
        """By modality, what stands for it in a prompt; empty where that is not known."""

    def __call__(self, probe: Probe) -> dict[str, Any]:
        start = 7 * probe.seed
        tokens = [self.words[(start + i) % len(self.words)] for i in range(probe.words)]
        if probe.medium is None:
            return {"prompt_token_ids": tokens}
        content = MEDIA[probe.modality](probe.medium, self.blank)
        words, mark = self.tokenizer.decode(tokens), self.placeholders[probe.modality]
        return {"prompt": words + mark + words, "multi_modal_data": {probe.modality: content}}


def placeholders(config: Any) -> dict[str, str]:
    """The modalities that probes can have, and what the model says stands for each in a prompt."""
    found: dict[str, str] = {}
    if not config.is_multimodal_model:
        return found
    from vllm.model_executor.model_loader.utils import get_model_cls

    cls: Any = get_model_cls(config)
    for modality in MEDIA:
        if limit(config, modality):
            try:
                found[modality] = cls.get_placeholder_str(modality, 1) or ""
            except (AttributeError, ValueError):
                found[modality] = ""
    return found


def limit(config: Any, modality: str) -> int:
    """How many of a modality a prompt may have."""
    if not config.is_multimodal_model:
        return 0
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info: Any = MULTIMODAL_REGISTRY.get_processing_info(config)
    allowed: int = info.allowed_mm_limits.get(modality, 0)
    return allowed


def picture(seed: int, blank: bool) -> Image.Image:
    image = drawing(seed).resize((64 + 32 * (seed % 2), 64))
    return Image.new("RGB", image.size, "gray") if blank else image


def film(seed: int, blank: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """Four frames, two a second."""
    frames = np.stack([np.asarray(picture(2 * seed + 10 * i, blank)) for i in range(4)])
    about = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    return frames, about | {"video_backend": "opencv", "do_sample_frames": False}


def tone(seed: int, blank: bool) -> tuple[np.ndarray, int]:
    """In noise: of noise alone, encoders make much the same."""
    random = np.random.default_rng(seed)
    seconds = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    wave = 0 if blank else 0.5 * np.sin(2 * np.pi * random.uniform(100, 4000) * seconds)
    return (wave + random.normal(0, 0.01, len(seconds))).astype(np.float32), SAMPLE_RATE


MEDIA: dict[str, Callable[[int, bool], Any]] = {"image": picture, "video": film, "audio": tone}


def media_then_text(groups: int = 8, modality: str = "") -> list[Probe]:
    """One to four short prompts with a medium, and then one to four of text, while the others
    decode or after them. All fit into captured sizes. Some come again, to the prefix cache. Answers
    are of different lengths: in lock-step, nothing leaks."""
    stream: list[Probe] = []
    for number in range(groups):
        media = [
            Probe(2 + (number + i) % 5, number + i, number + i, 1 + (number + i) % 3, 0)
            for i in range(1 + number % 4)
        ]
        if number % 3 == 1:
            media.append(replace(next(p for p in stream if p.medium is not None), joins_after=0))
        text = [
            Probe(
                3 + (5 * number + 4 * i) % 17, 7 * number + i, None, 2 + (3 * number + 2 * i) % 5, 0
            )
            for i in range(1 + number // 2 % 4)
        ]
        waits = OVERLAPPING if number % 3 == 2 else IDLE
        stream += [replace(media[0], joins_after=IDLE), *media[1:]]
        stream += [replace(text[0], joins_after=waits), *text[1:]]
    return [p if p.medium is None else replace(p, modality=modality) for p in stream]


def media_in_pieces(tokens: int, events: int = 4, modality: str = "") -> list[Probe]:
    """For steps that have one token of a prompt: beside a text that decodes, a prompt of so many
    tokens that has a medium; and then another text, in the row that it has left."""
    stream: list[Probe] = []
    for number in range(events):
        stream.append(Probe(5, 20, max_tokens=tokens + 40, judged=False))
        stream.append(Probe(3, number, 2 * number, 3, OVERLAPPING, modality=modality))
        waits = OVERLAPPING if number % 2 else tokens + 10
        stream.append(Probe(4, 40 + number, max_tokens=4 + number % 4, joins_after=waits))
    return stream


def prefixes(block: int) -> tuple[Probe, Probe]:
    """Two texts of which the second begins as the first, with a block of the prefix cache and
    more."""
    return Probe(block + 8, 60, max_tokens=4), Probe(block + 16, 60, max_tokens=4)


@dataclass
class Alone:
    """What each probe gets alone. Those of text are asked before the engine has seen a medium:
    in a broken one, nothing may ever clear what a medium left."""

    llm: Any
    prompts: Prompts
    flushes: bool
    """Whether `flush` is needed before a medium is asked alone."""
    in_python: Callable[[], AbstractContextManager[None]] = nullcontext
    """In which no graph is replayed."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters' folders by name."""
    found: dict[Probe, Served] = field(default_factory=dict)

    def ask(self, probes: Iterable[Probe]) -> None:
        """
        Raises:
            RefusedError: the engine refuses one.
        """
        for probe in dict.fromkeys(probe for probe in probes if probe.judged):
            if probe not in self.found:
                if probe.medium is not None and self.flushes:
                    self.flush()
                self.llm.reset_prefix_cache()
                (served,) = step_through(self.llm, [joining(probe, self.prompts, self.adapters)])
                if isinstance(served, RefusedError):
                    raise served
                self.found[probe] = served

    def flush(self) -> None:
        """Ends what the medium before left."""
        with self.in_python():
            flush(self.llm, lambda tokens: self.prompts(Probe(tokens, 0))["prompt_token_ids"])

    def in_stream(self, stream: list[Probe], tokens: int, cached: bool = False) -> Rows:
        """How far each request of a stream is from the same request alone, with at most so many
        tokens of a prompt a step (0: as the engine has it). `cached`: the prefix cache stays.

        Raises:
            RefusedError: the engine refuses one.
        """
        self.ask(stream)
        if not cached:
            self.llm.reset_prefix_cache()
        with chunks(self.llm, tokens):
            requests = [joining(probe, self.prompts, self.adapters) for probe in stream]
            served = step_through(self.llm, requests)
        rows = []
        for probe, each in zip(stream, served):
            if isinstance(each, RefusedError):
                raise each
            row: dict[str, Any] = {"kind": probe.modality if probe.medium is not None else "text"}
            row |= {"joined": each.joined, "ended": each.ended, "difference": None}
            if each.run and (alone := self.found[probe].run):
                row["difference"] = asdict(compare(each.run, alone))
            rows.append(row)
        return rows


def joining(probe: Probe, prompts: Prompts, adapters: Mapping[str, str]) -> Joining:
    return Joining(
        lambda: prompts(probe),
        probe.max_tokens,
        probe.joins_after,
        probe.judged,
        probe.grammar,
        (probe.adapter, adapters[probe.adapter]) if probe.adapter else None,
    )
