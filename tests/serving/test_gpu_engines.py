"""Serving on CUDA engines as vLLM configures them, with full and piecewise CUDA graphs.

Each engine is a process of its own; all that the selected tests need start together.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import missing_gpus
from tools.parity.compare import TOLERANCE

from .engine import Engine
from .soak import Soak, modalities, oracle_options, served_options, with_prompt_embeds
from .streams import Audio, Picture, Request, Text

bites = pytest.mark.bites
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

MODELS = ["qwen3_vl", "qwen3_omni"]
DTYPE = "bfloat16"
# A share of the GPU that lets a dozen engines start side by side.
MEMORY = ["--gpu-memory-utilization", "0.04", "--kv-cache-memory-bytes", str(2**30)]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SPECULATIVE = ["--speculative-config", json.dumps(NGRAM)]
PIECEWISE = ["--compilation-config", json.dumps({"cudagraph_mode": "PIECEWISE"})]
PROMPT_EMBEDS = ["--enable-prompt-embeds"]
CACHED, UNCACHED = "--enable-prefix-caching", "--no-enable-prefix-caching"
KINDS: dict[str, list[str]] = {
    "default": [],
    "sleeping": ["--enable-sleep-mode"],
    "no vision": ["--limit-mm-per-prompt", '{"image": 0, "video": 0}'],
    "chunks of 32": ["--max-num-batched-tokens", "32", CACHED, *PROMPT_EMBEDS],
    "chunks of 64": ["--max-num-batched-tokens", "64", UNCACHED],
    "piecewise": ["--max-num-batched-tokens", "128", CACHED, *PIECEWISE],
    "whole model": ["--compilation-config", json.dumps({"mode": 1}), UNCACHED],
    "speculative": ["--max-num-batched-tokens", "48", UNCACHED, *SPECULATIVE],
    "speculative, cached": ["--max-num-batched-tokens", "512", CACHED, *SPECULATIVE],
    "tensor parallel": ["--tensor-parallel-size", "2", "--max-num-batched-tokens", "64"],
    "pipeline parallel": ["--pipeline-parallel-size", "2", "--max-num-batched-tokens", "64"],
}
SOAKED = ["chunks of 32", "chunks of 64", "piecewise", "speculative", "speculative, cached"]
SHARDED = ["tensor parallel", "pipeline parallel"]
REQUESTS = 210  # each of the ten soaks


@pytest.fixture(scope="session")
def fleet(request, models, tmp_path_factory):
    """The engines of the selected tests, by model and kind, with one oracle a model."""
    wanted = dict.fromkeys(
        item.callspec.params["served"]
        for item in request.session.items
        if "served" in getattr(item, "fixturenames", ()) and missing_gpus(item) == 0
    )
    engines = {}
    for model, kind in [*dict.fromkeys((model, "oracle") for model, _ in wanted), *wanted]:
        if kind == "oracle":
            options = [*oracle_options(models[model], DTYPE), *PROMPT_EMBEDS]
        else:
            options = served_options(models[model], DTYPE, *KINDS[kind])
        folder = tmp_path_factory.mktemp("logs")
        # Upstream wants all DeepStack levels before the cut.
        cut = {"VLLM_PP_LAYER_PARTITION": "3,1"} if kind == "pipeline parallel" else {}
        engines[model, kind] = Engine(
            f"{model}-{kind.replace(' ', '-')}",
            [*options, *MEMORY],
            folder,
            HF_HUB_OFFLINE="1",
            VLLM_CACHE_ROOT=str(folder / "cache"),  # they compile side by side
            VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # `apply_model`
            **cut,
        )
    yield engines
    for engine in engines.values():
        engine.stop()


@pytest.fixture
def served(request, fleet):
    return fleet[request.param]


@pytest.fixture
def soak(request, fleet, served):
    model, _ = request.node.callspec.params["served"]
    soak = Soak(served, fleet[model, "oracle"], TOLERANCE[DTYPE])
    yield soak
    print(f"{soak.requests} requests, largest |Δlogit| {soak.largest:.3g}")


def on(kind, *variants, models=MODELS):
    """Parametrizes a test with a kind's engines. It bites on `variants` with Qwen3-VL; with
    Qwen3-Omni, vLLM 0.22.1 does not start on a Hopper: with images, for D8, and without,
    once #43617 is in, for D3."""
    omni = ("pr43617",) if kind == "no vision" else ("stock", "pr43617")
    return pytest.mark.parametrize(
        "served",
        [
            pytest.param(
                (model, kind),
                id=model,
                marks=bites(*(variants if model == "qwen3_vl" else omni)),
            )
            for model in models
        ],
        indirect=True,
    )


IMAGE = Request((Text(12), Picture(192, 160), Text(5)), max_tokens=8)
IMAGES = Request((Picture(100, 80, 1), Text(9, 1), Picture(200, 220, 2), Text(3)), max_tokens=8)
TEXT = Request((Text(12, 3),), max_tokens=8, joins_after=99)  # alone: nothing runs that long


@on("default", "stock")
def test_images_count(soak):
    """D1; and D8, without which Qwen3-Omni does not start on a Hopper."""
    soak.check([IMAGE, IMAGES, TEXT, IMAGES, IMAGE])


@on("chunks of 64", "pr43617", models=["qwen3_vl"])
def test_image_token_alone_in_a_step(soak):
    """D2: 65 tokens, of which the last is an image's, in chunks of 64; then text."""
    image_last = Request((Text(34), Picture(192, 160)), max_tokens=8, closed=False)
    soak.check([image_last, TEXT])


@on("no vision")
def test_engine_without_vision_tower(soak, request):
    """D3: text-only Qwen3-VL, audio-only Qwen3-Omni."""
    soak.check([TEXT])
    if "omni" in request.node.name:
        soak.check([Request((Text(5), Audio(900), Text(5)), max_tokens=8), TEXT])


@on("whole model")
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


@on("sleeping", "stock", "pr43617")
def test_buffers_outlive_sleep(soak):
    soak.served.model(mark_buffers)
    soak.served.sleep_and_wake()
    assert soak.served.model(unmark_buffers) == [3.0] * 3


@pytest.mark.parametrize(
    "served",
    [pytest.param((model, kind), id=f"{model}-{kind}") for model in MODELS for kind in SOAKED],
    indirect=True,
)
def test_soak(soak, request):
    model, kind = request.node.callspec.params["served"]
    drawn = with_prompt_embeds if PROMPT_EMBEDS[0] in KINDS[kind] else modalities
    soak.run(drawn(request.getfixturevalue("models")[model]), REQUESTS, SOAKED.index(kind))


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "served",
    [pytest.param((model, kind), id=f"{model}-{kind}") for model in MODELS for kind in SHARDED],
    indirect=True,
)
def test_sharded(soak, request):
    model, _ = request.node.callspec.params["served"]
    soak.run(modalities(request.getfixturevalue("models")[model]), 60, seed=1)
