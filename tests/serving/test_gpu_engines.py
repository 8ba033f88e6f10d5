"""Serving on CUDA engines: with and without a tower, asleep, sharded, in random streams."""

from __future__ import annotations

import json

import pytest
import torch

from tests.fleet import DTYPE, Case, Mode
from vllm_deepstack.check.compare import TOLERANCE
from vllm_deepstack.check.modes import DEFAULT, graphs

from .soak import DifferenceError, Soak, modalities, with_prompt_embeds
from .streams import Audio, Picture, Request, Text

bites = pytest.mark.bites
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]

MODELS = ["qwen3_vl", "qwen3_omni"]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SPECULATIVE = ("--speculative-config", json.dumps(NGRAM))
PROMPT_EMBEDS = ("--enable-prompt-embeds",)
CACHED, UNCACHED = "--enable-prefix-caching", "--no-enable-prefix-caching"


def chunks(tokens: int) -> tuple[str, str]:
    return ("--max-num-batched-tokens", str(tokens))


SLEEPING = Mode("sleeping", ("--enable-sleep-mode",))
NO_VISION = Mode("no vision", ("--limit-mm-per-prompt", '{"image": 0, "video": 0}'))
WHOLE_MODEL = Mode("whole model", ("--compilation-config", json.dumps({"mode": 1}), UNCACHED))
SYNC_CHECK = Mode(
    "sync check",
    env=(("VLLM_GPU_SYNC_CHECK", "error"),),
    releases=">=0.25",
    lacking="VLLM_GPU_SYNC_CHECK came with 0.25.0",
)
CHUNKS_OF_64 = Mode("chunks of 64", (*chunks(64), UNCACHED))
SOAKED = {
    Mode("chunks of 32", (*chunks(32), CACHED)): PROMPT_EMBEDS,
    CHUNKS_OF_64: (),
    Mode("chunks of 128, piecewise", (*chunks(128), CACHED, *graphs("PIECEWISE"))): (),
    Mode("speculative", (*chunks(48), UNCACHED, *SPECULATIVE)): (),
    Mode("speculative, cached", (*chunks(512), CACHED, *SPECULATIVE)): (),
}
SHARDED = [
    Mode("tensor parallel", ("--tensor-parallel-size", "2", *chunks(64))),
    Mode(
        "pipeline parallel",
        ("--pipeline-parallel-size", "2", *chunks(64)),
        # Upstream wants all DeepStack levels before the cut.
        env=(("VLLM_PP_LAYER_PARTITION", "3,1"),),
    ),
]
REQUESTS = 210  # each of the ten soaks


@pytest.fixture
def soak(case, fleet, figures, request):
    soak = Soak(fleet.engine(case), fleet.oracle(case), TOLERANCE[DTYPE])
    yield soak
    figures(
        what=request.node.originalname.removeprefix("test_").replace("_", " "),
        model=case.model,
        mode=case.mode.name,
        requests=soak.requests,
        largest=soak.largest,
        tolerance=soak.tolerance,
    )


def on(mode, *variants, models=MODELS):
    """Parametrizes a test with a mode's engines. It bites on `variants` with Qwen3-VL alone: vLLM
    0.22.1 does not start with Qwen3-Omni on a Hopper (D8), and shows nothing else."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                Case(model, mode), id=model, marks=bites(*variants if model == "qwen3_vl" else ())
            )
            for model in models
        ],
    )


IMAGE = Request((Text(12), Picture(192, 160), Text(5)), max_tokens=8)
IMAGES = Request((Picture(100, 80, 1), Text(9, 1), Picture(200, 220, 2), Text(3)), max_tokens=8)
TEXT = Request((Text(12, 3),), max_tokens=8, joins_after=99)  # alone: nothing runs that long


@on(DEFAULT, "stock")
def test_images_count(soak):
    """D1; and D8, with which Qwen3-Omni does not start on a Hopper."""
    soak.check([IMAGE, IMAGES, TEXT, IMAGES, IMAGE])


@on(SYNC_CHECK, models=["qwen3_vl"])
def test_no_step_waits_for_the_gpu(soak):
    """An engine ends where the host waits in a step. Qwen3-Omni's steps with images do wait, as
    released, too: token ids are compared on the host."""
    soak.check([IMAGE, IMAGES, TEXT, IMAGE])


@on(CHUNKS_OF_64, "pr43617", models=["qwen3_vl"])
def test_image_token_alone_in_a_step(soak):
    """D2: 65 tokens, of which the last is an image's, in chunks of 64; then text."""
    image_last = Request((Text(34), Picture(192, 160)), max_tokens=8, closed=False)
    soak.check([image_last, TEXT])


@on(NO_VISION)
def test_engine_without_vision_tower(soak, case):
    """D3: text-only Qwen3-VL, audio-only Qwen3-Omni."""
    soak.check([TEXT])
    if case.model == "qwen3_omni":
        soak.check([Request((Text(5), Audio(900), Text(5)), max_tokens=8), TEXT])


@on(WHOLE_MODEL)
def test_whole_model_compiled(soak):
    """`CompilationMode.STOCK_TORCH_COMPILE`: 60 steps or more, with images and without, of
    different lengths. CPU engines never compile the outer model."""
    for number in range(15):
        picture = Picture(64 + 32 * (number % 5), 64 + 32 * (number % 3), number % 4)
        image = Request((Text(3 + 5 * number % 40), picture, Text(4)), max_tokens=3)
        text = Request((Text(5 + 7 * number % 60),), max_tokens=3, joins_after=99)
        soak.check([image, text])


@torch.inference_mode()
def mark_buffers(model) -> None:
    for buffer in model.deepstack_input_embeds:
        buffer.fill_(3)


@torch.inference_mode()
def unmark_buffers(model) -> list[float]:
    """The least of each buffer."""
    least = [buffer.min().item() for buffer in model.deepstack_input_embeds]
    for buffer in model.deepstack_input_embeds:
        buffer.zero_()
    return least


@on(SLEEPING, "stock", "pr43617", "newest")
def test_buffers_outlive_sleep(soak):
    soak.served.model(mark_buffers)
    soak.served.sleep_and_wake()
    if (least := soak.served.model(unmark_buffers)) != [3.0] * 3:
        raise DifferenceError(f"the buffers' marks, 3, are {least}")


def cases(modes) -> list[Case]:
    return [Case(model, mode, common) for model in MODELS for mode, common in modes]


@pytest.mark.parametrize("case", cases(SOAKED.items()), ids=str)
def test_soak(soak, case, fleet):
    drawn = with_prompt_embeds if case.common == PROMPT_EMBEDS else modalities
    soak.run(drawn(fleet.checkpoints[case.model]), REQUESTS, seed=list(SOAKED).index(case.mode))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", cases([(mode, ()) for mode in SHARDED]), ids=str)
def test_sharded(soak, case, fleet):
    soak.run(modalities(fleet.checkpoints[case.model]), 60, seed=1)
