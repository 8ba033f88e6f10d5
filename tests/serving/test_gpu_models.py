"""The other models that stage features beside the decoder's inputs, each on real engines:
compiled against eager, then text after images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.fleet import DTYPE, Case, Mode
from tools.parity.compare import TOLERANCE

from .modes import BREAKABLE, DEFAULT
from .streams import EMBEDS_TOKEN, Audio, Embeds, Picture, Request, Text
from .test_gpu_engines import IMAGE, IMAGES, TEXT
from .test_gpu_leaks import check, images_then_texts
from .weights import draw_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]

DUMMY = ("--load-format", "dummy", "--trust-remote-code")
# The others' kernels are compiled when they are first used, for minutes.


def on(mode: Mode, *marks: pytest.MarkDecorator):
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(Case(model, mode), id=f"{model}-{mode.name}", marks=marks)
            for model in ("qwen3_vl_moe", "cohere_compass", "granite4_vision")
        ],
    )


@on(DEFAULT, pytest.mark.holds("newest"))
def test_images_count(case, fleet, figures):
    # Granite adds six levels, each rounded to bfloat16: 0.27 on an H100, as released, too; in
    # float32 it is 2e-5 from Transformers.
    limit = 2 * TOLERANCE[DTYPE] if case.model == "granite4_vision" else None
    check(fleet, case, [IMAGE, IMAGES, TEXT], figures, "images, compiled", limit=limit)


@on(BREAKABLE, pytest.mark.bites("newest"))
def test_text_after_images(case, fleet, figures):
    """D2."""
    check(fleet, case, images_then_texts(), figures, "images then texts")


@dataclass(frozen=True)
class Heard(Request):
    """A request of MOSS-Audio, whose audio tokens have ids of their own."""

    def prompt(self, tokenizer: Any, hidden_size: int = 0) -> dict[str, Any]:
        ids: list[int] = []
        for part in self.parts:
            if isinstance(part, Embeds):
                ids.append(EMBEDS_TOKEN)
            else:
                ids += part.ids() if isinstance(part, Text) else [151669, 151654, 151670]
        given = super().prompt(tokenizer, hidden_size)
        return given | {"prompt_token_ids": ids}


def heard(stream: list[Request]) -> list[Request]:
    """The stream with a sound in place of each picture. All are as long: in one batch, as released,
    too, the encoder's output of the shorter one depends on the longer one's length (by 0.09)."""
    requests: list[Request] = []
    for request in stream:
        parts = tuple(
            Audio(600, part.seed) if isinstance(part, Picture) else part for part in request.parts
        )
        requests.append(Heard(parts, request.max_tokens, joins_after=request.joins_after))
    return requests


def draw(fleet, case, request: Request) -> None:
    """Weights for the case's engines. With them, the first medium of a request has to count."""
    for engine in (fleet.engine(case), fleet.engine(case.eager)):
        engine.model(draw_weights)
    parts = [p if isinstance(p, Text) else replace(p, seed=p.seed + 1) for p in request.parts]
    one, other = (
        fleet.oracle(case).serve([each])[0].logits[0]
        for each in (request, replace(request, parts=tuple(parts)))
    )
    assert abs(one - other).max() > 0.5, "another medium does not change the logits"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("moss_audio", DEFAULT, DUMMY), marks=pytest.mark.bites("newest")),
        Case("moss_audio", BREAKABLE, DUMMY),  # not run as released
    ],
    ids=str,
)
def test_moss_audio(case, fleet, figures):
    """D1: compiled, audio loses its levels."""
    stream = heard(images_then_texts())
    draw(fleet, case, stream[0])
    check(fleet, case, stream, figures, "audio then texts")
