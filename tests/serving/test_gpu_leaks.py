"""No request sees another's image, in whichever way vLLM replays CUDA graphs (D2).

Streams in which requests with images and requests of text alone follow one another and overlap;
each request's logits against the same request's alone, on an eager engine.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.fleet import NANO, Case

from .modes import BATCH_INVARIANT, PIECEWISE, cases
from .soak import DifferenceError
from .streams import Picture, Request, Text

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]

IDLE = 99  # steps: more than any request takes, so that it joins when all have ended
OVERLAPPING = 2
CHUNK = 32


def texts(
    number: int, count: int, joins_after: int, least: int, most: int | None = None
) -> list[Request]:
    """`count` requests of different lengths; the first joins after so many steps, all at once.
    Their answers are drawn from `least` to `most` tokens: in lock-step, nothing leaks."""
    lengths = np.random.default_rng(number).integers(least, most or least, count, endpoint=True)
    requests = [
        Request((Text(3 + (5 * number + 4 * i) % 17, 7 * number + i),), int(lengths[i]))
        for i in range(count)
    ]
    return [replace(requests[0], joins_after=joins_after), *requests[1:]]


def images_then_texts() -> list[Request]:
    """One to four short prompts with an image, and then one to four of text, while the others
    decode or after them. All fit into captured sizes."""
    stream: list[Request] = []
    for number in range(12):
        for i in range(1 + number % 4):
            picture = Picture(64 + 32 * (i % 2), 64 + 32 * (number % 2), number + i)
            parts = (Text(2 + (number + i) % 5, number + i), picture, Text(1 + i, number))
            request = Request(parts, max_tokens=1 + (number + i) % 3)
            stream.append(replace(request, joins_after=0 if i else IDLE))
        joins_after = OVERLAPPING if number % 3 == 2 else IDLE
        stream += texts(number, 1 + number // 2 % 4, joins_after, 2, 8)
    return stream


def ends_in_image(parts: tuple[Text | Picture, ...], max_tokens: int, then_text: bool) -> Request:
    """A prompt whose last token is an image's; or with an end mark and a text after it."""
    parts = (*parts, Text(1)) if then_text else parts
    return Request(parts, max_tokens, closed=then_text, joins_after=OVERLAPPING)


def image_ends_prompt(then_text: bool) -> list[Request]:
    """While texts decode, a prompt whose last token is its image's, alone in its step; then
    another text. With `then_text`, an end mark and a text are beside it."""
    stream: list[Request] = []
    for number in range(8):
        stream += texts(number, 1 + number % 4, IDLE, 12, 20)
        picture = Picture(96, 64 + 32 * (number % 2), number)
        before = Text(CHUNK - picture.tokens(), number)  # beside the image's start
        stream.append(ends_in_image((before, picture), 1 + number % 3, then_text))
        stream += texts(number + 50, 1, OVERLAPPING, 2, 8)
    return stream


def image_trickles(then_text: bool) -> list[Request]:
    """Beside a text that decodes, one token of a prompt in a step, an image's among them; and
    another text."""
    stream: list[Request] = []
    for number in range(11):
        stream += texts(number + 20, 1, IDLE, 16, 24)
        picture = Picture(64, 64 + 32 * (number % 2), number)
        parts = (Text(3, number), picture)
        if number % 3:
            stream.append(Request((*parts, Text(2, number)), 3, joins_after=OVERLAPPING))
        else:
            stream.append(ends_in_image(parts, 3, then_text))
        stream += texts(number + 40, 1, OVERLAPPING * (number % 2), 3, 9)
    return stream


def streams(then_text: bool) -> dict[str, tuple[list[Request], int]]:
    """And the most tokens of a prompt in a step."""
    return {
        "images then texts": (images_then_texts(), 0),
        "image ends prompt": (image_ends_prompt(then_text), CHUNK),
        "image trickles": (image_trickles(then_text), 1),
    }


@pytest.mark.parametrize(
    "case",
    [
        # 0.22.1 loses levels (D1). From 0.23.0 on, features outlive their step; not in piecewise
        # graphs, between which the model's own Python runs at each step, and clears.
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.bites("stock"), pytest.mark.holds("newest")]
            if case.mode == PIECEWISE
            else pytest.mark.bites("stock", "newest"),
        )
        for model in (NANO, "qwen3_omni")
        for case in cases(model)
    ],
)
def test_no_request_sees_anothers_image(case, fleet, figures, pytestconfig):
    # A prompt that ends in a placeholder ends an Omni engine as released, before it leaks (D12).
    then_text = case.model == "qwen3_omni" and bool(pytestconfig.getoption("--bites"))
    check_streams(fleet, case, figures, then_text)


def check_streams(fleet, case, figures, then_text: bool = False) -> None:
    """All streams are served, and what is wrong in each is in the figures."""
    wrong = 0
    for what, (stream, threshold) in streams(then_text).items():
        found = fleet.compare(case, stream, threshold=threshold)
        figures(what=what, **found)
        wrong += found["wrong"]
    if wrong:
        raise DifferenceError(f"{wrong} requests differ")


def check(fleet, case, stream, figures, what: str, **how: float) -> None:
    """`how`: as `Fleet.compare` has it."""
    found = fleet.compare(case, stream, **how)
    figures(what=what, **found)
    if found["wrong"]:
        raise DifferenceError(f"{found['wrong']} requests differ, by up to {found['largest']:.2g}")


@pytest.mark.release(">=0.31")
@pytest.mark.bites("newest")
@pytest.mark.parametrize(
    "case",
    [Case("qwen3_vl_2b", BATCH_INVARIANT, common_env=BATCH_INVARIANT.env)],
    ids=str,
)
def test_deterministic_mode_is_deterministic(case, fleet, figures):
    """With `VLLM_BATCH_INVARIANT=1` and nothing else, vLLM switches breakable graphs on for the
    shapes of Qwen3-VL-2B's decoder: each answer is to be the same alone, to the bit."""
    check(fleet, case, images_then_texts(), figures, "images then texts", limit=0.0)
