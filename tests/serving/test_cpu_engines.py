"""Serving as it is, on CPU engines: chunked, batched, cached, sharded; and engines that are
known to be wrong, which the same check has to find out."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import HIDDEN
from vllm_deepstack.check.compare import TOLERANCE, Run, compare
from vllm_deepstack.check.processes import EngineError
from vllm_deepstack.patch.tree import Tree

from .engine import Engine
from .soak import (
    DifferenceError,
    Soak,
    modalities,
    oracle_options,
    served_options,
    with_prompt_embeds,
)
from .streams import Audio, Embeds, Picture, Request, Text, Video

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MEMORY = ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too
CORES = [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]
CACHED = ["--enable-prefix-caching", "--block-size", "32"]
SHARDED = {
    "tensor": ["--tensor-parallel-size", "2", "--max-num-batched-tokens", "128"],
    "pipeline": ["--pipeline-parallel-size", "2", "--max-num-batched-tokens", "128"],
}
# Upstream wants all DeepStack levels before the cut.
CUT = {"tensor": {}, "pipeline": {"VLLM_PP_LAYER_PARTITION": "3,1"}}


PROMPT_EMBEDS = ["--enable-prompt-embeds"]
IMAGE = Request((Text(12), Picture(192, 160), Text(5)), max_tokens=4)
TEXT = Request((Text(12, 3),), max_tokens=4)
EMBEDS_AND_IMAGE = Request(
    (Embeds(3), Text(4), Picture(64, 96), Embeds(5, 1), Text(2)), max_tokens=4
)


def endings(model: Path) -> list[Request]:
    """Prompts that end in a medium: in its end mark, in itself, or side by side with another;
    that begin with it; or that are it."""
    media: list[Any] = [Picture(64, 96, 1)]
    if "audio" in modalities(model):
        media += [Video(2, 1), Audio(900, 1)]  # of Qwen3-VL, a video has to have its marks
    requests = []
    for medium in media:
        requests += [
            Request((Text(5), medium), max_tokens=3),
            Request((Text(5), medium), max_tokens=3, closed=False),
            Request((Text(5), medium, Picture(96, 64, 2)), max_tokens=3, bare=True),
            Request((medium, Text(1), Picture(96, 64, 2), Text(3)), max_tokens=3, bare=True),
            Request((medium,), max_tokens=3, bare=True),
        ]
    return [*requests, TEXT]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_omni"])
def model(request, models):
    return models[request.param]


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
    """Starts an engine; all are stopped with the module's tests of the model."""
    engines = []
    cache = tmp_path_factory.mktemp("cache")

    def start(options, tree=None, cores=CORES[0], **env):
        env |= {
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "HF_HUB_OFFLINE": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `apply_model`
        }
        folder = tmp_path_factory.mktemp("logs")
        engines.append(Engine("engine", [*options, *MEMORY], folder, tree, **env))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def oracle(model, start):
    return start([*oracle_options(model, "float32"), *PROMPT_EMBEDS], cores=CORES[-1])


@pytest.fixture
def soak(model, start, oracle):
    """`soak(options)`: a Soak of an engine with these options, and of the oracle."""
    served = []

    def soak(*options, **kind):
        served.append(start(served_options(model, "float32", *options), **kind))
        return Soak(served[-1], oracle, TOLERANCE["float32"])

    yield soak
    for engine in served:
        engine.stop()


def test_soak(soak, model):
    checked = soak("--max-num-batched-tokens", "64", *CACHED, *PROMPT_EMBEDS)
    checked.check(endings(model))
    checked.check([IMAGE, EMBEDS_AND_IMAGE, TEXT, EMBEDS_AND_IMAGE])
    checked.run(with_prompt_embeds(model), 60, seed=0)
    assert checked.compared > 180


@pytest.mark.optional
@pytest.mark.parametrize(
    "model, error",
    [("qwen3_vl", "Sizes of tensors must match"), ("qwen3_omni", "Position ids length mismatch")],
    indirect=["model"],
)
def test_a_prompt_ends_the_stock_release(start, model, error, stock_tree):
    """D14; D12. For everybody: the request is gone with the engine, and so are all others."""
    options = [*oracle_options(model, "float32"), *PROMPT_EMBEDS]
    engine = start(options, tree=stock_tree)
    (served,) = engine.serve([TEXT])
    assert served.logits.shape[0] == TEXT.max_tokens
    with pytest.raises(EngineError, match=error):
        engine.serve([EMBEDS_AND_IMAGE] if error.startswith("Sizes") else endings(model)[:1])
    engine.stop()


def encode(checkpoint: Path, picture: Picture, model: Any) -> tuple[Any, Any]:
    """What the vision tower gives for a picture, and the grid that it has."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint).image_processor
    inputs = processor(images=[picture.content()], return_tensors="pt")
    grid = inputs["image_grid_thw"]
    pixels = inputs["pixel_values"].to(next(model.parameters()))
    with torch.inference_mode():
        embeds = model.embed_multimodal(pixel_values=pixels, image_grid_thw=grid)[0]
    return embeds.float().cpu().numpy(), grid.numpy()


@dataclass(frozen=True, eq=False)
class Given(Request):
    """A prompt with an image's embeddings in place of the image."""

    embeddings: tuple[Any, Any] | None = None

    def prompt(self, tokenizer: Any, hidden_size: int = 0) -> dict[str, Any]:
        assert self.embeddings
        embeds, grid = map(torch.from_numpy, self.embeddings)
        data = {"image": {"image_embeds": embeds, "image_grid_thw": grid}}
        return super().prompt(tokenizer) | {"multi_modal_data": data, "multi_modal_uuids": None}


EMBEDS_ONLY = ["--limit-mm-per-prompt", '{"image": 0, "video": 0}', "--enable-mm-embeds"]


@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)  # 0.22.1 refuses Omni's requests
@pytest.mark.parametrize("stock", [False, pytest.param(True, marks=pytest.mark.optional)])
def test_embeddings_in_place_of_images(start, model, oracle, stock, stock_tree):
    """D15: an engine without a vision tower, that is sent what another's tower gave."""
    (alone,) = oracle.serve([IMAGE])
    picture = next(part for part in IMAGE.parts if isinstance(part, Picture))
    embeds, grid = oracle.model(partial(encode, model, picture))
    options = [*oracle_options(model, "float32"), *EMBEDS_ONLY]
    engine = start(options, tree=stock_tree if stock else None)
    request = Given(IMAGE.parts, IMAGE.max_tokens, embeddings=(embeds, grid))
    if stock:
        # Eager, its buffers are not inputs; compiled, it drops the levels and says nothing.
        with pytest.raises(EngineError, match="device meta"):
            engine.serve([request])
    else:
        narrow = Given(IMAGE.parts, IMAGE.max_tokens, embeddings=(embeds[:, :HIDDEN], grid))
        served, refused, text = engine.serve([request, narrow, TEXT])
        assert isinstance(served, Run), served
        assert compare(served, alone).largest < TOLERANCE["float32"]
        assert f"{HIDDEN} wide; the model takes {4 * HIDDEN}" in str(refused)
        assert compare(text, oracle.serve([TEXT])[0]).largest < TOLERANCE["float32"]
    engine.stop()


@pytest.mark.parametrize(
    "model, kind",
    [
        ("qwen3_omni", "pipeline"),
        pytest.param("qwen3_vl", "tensor", marks=pytest.mark.optional),
        pytest.param("qwen3_vl", "pipeline", marks=pytest.mark.optional),
        pytest.param("qwen3_omni", "tensor", marks=pytest.mark.optional),
    ],
    indirect=["model"],
)
def test_sharded(soak, model, kind):
    """Against one engine that is neither sharded nor compiled."""
    checked = soak(*SHARDED[kind], cores="|".join(CORES), **CUT[kind])
    checked.run(modalities(model), 25, seed=1)
    assert checked.compared > 75


@pytest.mark.optional
@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)
def test_soak_finds_what_the_stock_release_loses(soak, model, stock_tree, tmp_path):
    """D1, by itself, and on a stream of one request with one image. Also if the installation is
    patched meanwhile: an engine that runs goes on with what it has loaded."""
    tree = shutil.copytree(stock_tree, tmp_path / "tree", copy_function=os.link)
    checked = soak("--max-num-batched-tokens", "64", tree=tree)
    checked.check([Request((Text(20),), max_tokens=5)])
    Tree(tree).apply()
    with pytest.raises(DifferenceError) as found:
        checked.run(modalities(model), 100, seed=0)
    print(found.value, *found.value.__notes__, sep="\n")
    assert checked.largest > 0.5
    (stream,) = [note for note in found.value.__notes__ if "stream=[" in note]
    assert stream.count("Request(") == 1
    assert "Picture(" in stream or "Video(" in stream


@pytest.mark.optional
@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)
def test_stock_release_does_not_start_with_pipeline_parallelism(soak, stock_tree):
    """D11."""
    options, cores = SHARDED["pipeline"], "|".join(CORES)
    checked = soak(*options, tree=stock_tree, cores=cores, **CUT["pipeline"])
    with pytest.raises(EngineError, match="No model architectures are specified"):
        checked.served.serve([])


@pytest.mark.optional  # tests/deepstack/test_init.py has its buffers
@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)
def test_engine_without_vision_tower(soak):
    """D3."""
    checked = soak("--limit-mm-per-prompt", '{"image": 0, "video": 0}')
    checked.check([Request((Text(20),), max_tokens=5)])
