"""The other models that stage features beside the decoder's inputs, each on real engines:
compiled against eager, then text after images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from tests.fleet import DTYPE, Case, Mode
from vllm_deepstack.check.compare import TOLERANCE, compare
from vllm_deepstack.check.processes import EngineError

from .modes import BREAKABLE, DEFAULT, FULL, V1, cases
from .soak import DifferenceError
from .streams import EMBEDS_TOKEN, Audio, Embeds, Picture, Request, Text
from .test_cpu_engines import Given, encode
from .test_gpu_engines import IMAGE, IMAGES, TEXT
from .test_gpu_leaks import IDLE, check, check_streams, images_then_texts
from .test_gpu_modes import GRAPHED
from .weights import draw_weights

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]

DUMMY = ("--load-format", "dummy", "--trust-remote-code")


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


TRANSFORMERS = Mode(
    "Transformers backend",
    ("--model-impl", "transformers", "--enforce-eager"),
    releases=">=0.32",
    lacking="its levels are dropped up to 0.31.0, with the fork, too",
)


@pytest.mark.bites("newest")
@pytest.mark.parametrize("case", [Case("qwen3_vl", TRANSFORMERS)], ids=str)
def test_transformers_backend(case, fleet, figures):
    """D16. Judged by vLLM's own class. Compiled, texts are off, too, as released (0.33.0, H100)."""
    check(fleet, case, images_then_texts(), figures, "images then texts")


ERNIE = (*DUMMY, "--limit-mm-per-prompt", '{"image": 3, "video": 0}')


@pytest.mark.bites("newest")
@pytest.mark.parametrize(
    "case", cases("ernie4_5_vl", modes=[DEFAULT, FULL, BREAKABLE], common=ERNIE), ids=str
)
def test_experts_of_vision(case, fleet, figures):
    """D17. By default, decoding alone is replayed, and an image's tokens when they come singly."""
    draw(fleet, case, images_then_texts()[0])
    check_streams(fleet, case, figures)


PRUNED = ("--video-pruning-rate", "0.5")
EMBEDS = [
    Request((Embeds(3), Text(4)), max_tokens=6, joins_after=IDLE),
    Request((Embeds(3), Text(4), Picture(64, 96), Embeds(5, 1), Text(2)), max_tokens=6),
]


@pytest.mark.parametrize(
    "case",
    [
        Case(model, DEFAULT, ("--enable-prompt-embeds", *options))
        for model, options in (
            ("granite4_vision", ()),
            ("moss_audio", DUMMY),
            ("qwen3_vl", PRUNED),
            ("cohere_compass", PRUNED),
        )
    ],
    ids=str,
)
def test_prompt_embeds_beside_media(case, fleet, figures):
    """D18: as released they end the engine, which test_newest.py shows; also alone, in Granite."""
    stream = [IMAGE, *EMBEDS]
    if case.model == "moss_audio":
        draw(fleet, case, (stream := heard(stream))[0])
    limit = 2 * TOLERANCE[DTYPE] if case.model == "granite4_vision" else None
    check(fleet, case, [*stream, TEXT, *stream], figures, "prompt_embeds", limit=limit)


SENT = Case("qwen3_vl", Mode("encoder graphs, embeddings", GRAPHED), ("--enable-mm-embeds",))


@pytest.mark.bites("newest")
@pytest.mark.parametrize("case", [SENT], ids=str)
def test_embeddings_where_the_encoder_has_graphs(case, fleet, figures):
    """D18: a graph takes pixels. Such an engine encodes without graphs."""
    picture = Picture(192, 160)
    encoded = partial(encode, fleet.checkpoints[case.model], picture)
    given = Given(IMAGE.parts, IMAGE.max_tokens, embeddings=fleet.engine(case.eager).model(encoded))
    try:
        served, _, image, _ = fleet.engine(case).serve([given, TEXT, IMAGE, TEXT])
    except EngineError as error:
        raise DifferenceError(f"the engine ended: {error}") from None
    difference = compare(served, image).largest
    figures(what="embeddings", model=case.model, mode=case.mode.name, largest=difference)
    assert difference < TOLERANCE[DTYPE]


STAGES = ("--pipeline-parallel-size", "2")
TEXT_STAGES = Mode("sharded, text", (*STAGES, "--limit-mm-per-prompt", '{"image": 0}'))


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "case",
    [
        # As released, Model Runner V2 ends.
        Case("granite4_vision", Mode("sharded, stages", STAGES)),
        pytest.param(
            Case("granite4_vision", replace(V1, name="sharded, stages, V1", options=STAGES)),
            marks=pytest.mark.bites("newest"),
        ),
    ],
    ids=str,
)
def test_granite_sharded_in_stages(case, fleet, figures):
    """D19: levels of layers of the later stage."""
    limit = 2 * TOLERANCE[DTYPE]
    check(fleet, case, images_then_texts(), figures, "images then texts", limit=limit)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", [Case("granite4_vision", TEXT_STAGES)], ids=str)
def test_granite_sharded_of_text_alone(case, fleet):
    """D19: as released, V2 waits for levels that an engine without a tower does not send."""
    (served,) = fleet.engine(case).serve([TEXT])
    assert served.logits.shape[0] == TEXT.max_tokens
