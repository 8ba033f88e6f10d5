"""Serving as it is, on CPU engines: chunked, batched, cached, sharded; and engines that are
known to be wrong, which the same check has to find out."""

from __future__ import annotations

import os
import shutil

import pytest

from tools.overlay.tree import Tree
from tools.parity import ParityError
from tools.parity.compare import TOLERANCE

from .engine import Engine
from .soak import DifferenceError, Soak, modalities, oracle_options, served_options
from .streams import Request, Text

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
        }
        folder = tmp_path_factory.mktemp("logs")
        engines.append(Engine("engine", [*options, *MEMORY], folder, tree, **env))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def oracle(model, start):
    return start(oracle_options(model, "float32"), cores=CORES[-1])


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
    checked = soak("--max-num-batched-tokens", "64", *CACHED)
    checked.run(modalities(model), 60, seed=0)
    assert checked.compared > 180


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded(soak, model, kind):
    """Against one engine that is neither sharded nor compiled."""
    checked = soak(*SHARDED[kind], cores="|".join(CORES), **CUT[kind])
    checked.run(modalities(model), 25, seed=1)
    assert checked.compared > 75


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


@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)
def test_stock_release_does_not_start_with_pipeline_parallelism(soak, stock_tree):
    """D11."""
    options, cores = SHARDED["pipeline"], "|".join(CORES)
    checked = soak(*options, tree=stock_tree, cores=cores, **CUT["pipeline"])
    with pytest.raises(ParityError, match="No model architectures are specified"):
        checked.served.serve([])


@pytest.mark.parametrize("model", ["qwen3_vl"], indirect=True)
def test_engine_without_vision_tower(soak):
    """D3."""
    checked = soak("--limit-mm-per-prompt", '{"image": 0, "video": 0}')
    checked.check([Request((Text(20),), max_tokens=5)])
