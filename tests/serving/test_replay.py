"""No request sees another's image (D2), none loses its own (D1), where CUDA graphs are replayed:
on CPU engines, whose `forward` is recorded and replayed (vllm_deepstack/check/replay.py).

Each request's logits against the same request's alone, in Python; and, where a step is replayed, to
the digit against Python on as many rows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from tests import tiny_models
from tests.conftest import can_run_experts, version
from tests.fleet import MODELS as SINCE
from vllm_deepstack.check.compare import TOLERANCE, Run, compare
from vllm_deepstack.check.processes import bound

from .engine import Engine
from .soak import DifferenceError, Soak, served_options
from .streams import Request, Text
from .test_gpu_leaks import CHUNK, IDLE, streams
from .test_gpu_models import DUMMY, heard

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
bites = pytest.mark.bites("stock", "pr43617", "0.32.0")

MODELS = [
    "qwen3_vl",
    "qwen3_omni",
    "qwen3_vl_moe",
    "cohere_compass",
    "granite4_vision",
    "moss_audio",
]
REPLAYS = ("replay", "replay-decode")
CORES = sorted(os.sched_getaffinity(0))[:2]
LIMIT = TOLERANCE["float32"]
MEMORY = ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too
CACHED = ["--enable-prefix-caching", "--block-size", "32"]


@dataclass
class Replayed:
    """An engine in a mode of `replay.Graphs`."""

    engine: Engine
    mode: str
    by: str = "graph"

    def budget(self) -> int:
        return self.engine.budget()

    def serve(self, stream: list[Request], threshold: int = 0) -> list[Run]:
        return self.engine.serve(stream, threshold, self.mode, self.by)


def dense() -> bool:
    """Whether Omni's layers have to be, here and on this release."""
    return SpecifierSet("<0.23").contains(version()) and not can_run_experts()


def lacking(model: str) -> str:
    releases, reason = SINCE.get(model, ("", ""))
    if releases and not SpecifierSet(releases).contains(version()):
        return f"vLLM {version()}: {reason}"
    if model in ("qwen3_vl_moe", "ernie4_5_vl") and dense():
        return f"{model}: vLLM {version()} needs AVX-512 without AMX for experts"
    return ""


def options(model: str, checkpoint: Path) -> list[str]:
    made = [*served_options(checkpoint, "float32", "--enforce-eager", *CACHED), *MEMORY]
    return [*made, *(DUMMY if model == "moss_audio" else ())]


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Callable[[str], Engine]]:
    """`started(model)`: its engine; the next model's starts meanwhile, on another core."""
    folder, found = tmp_path_factory.mktemp("replay"), dict[str, Engine]()
    cores = itertools.cycle(CORES)

    def start(model: str) -> Engine:
        make = (tiny_models.MODELS | tiny_models.OTHERS)[model]
        how = {"dense": True} if model == "qwen3_omni" and dense() else {}
        checkpoint = make(folder / model, **how)
        env = {"VLLM_CACHE_ROOT": str(folder / "cache"), **bound([next(cores)])}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        return Engine(model, options(model, checkpoint), folder, **env)

    def started(model: str) -> Engine:
        for other in MODELS[MODELS.index(model) :][:2]:
            if other not in found and not lacking(other):
                found[other] = start(other)
        return found[model]

    yield started
    for engine in found.values():
        engine.stop()


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> str:
    if reason := lacking(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def engine(model, started) -> Iterator[Engine]:
    engine = started(model)
    assert engine.record()["warnings"] == []
    yield engine
    engine.stop()


def streams_of(model: str) -> dict[str, tuple[list[Request], int]]:
    # A prompt that ends in a placeholder ends an Omni engine as released, before it leaks (D12).
    found = streams(then_text=model == "qwen3_omni")
    if model == "moss_audio":
        found = {name: (heard(stream), chunk) for name, (stream, chunk) in found.items()}
    return found


@bites
def test_no_request_sees_anothers_medium(engine, model, figures):
    wrong, soak = 0, Soak(Replayed(engine, "run"), Replayed(engine, "run"), LIMIT)
    for (what, (stream, chunk)), mode in itertools.product(streams_of(model).items(), REPLAYS):
        soak.served = served = Replayed(engine, mode)
        off = [difference.largest for difference in soak.differences(stream, threshold=chunk)]
        count = sum(each > LIMIT for each in off)
        figures(what=what, model=model, mode=mode, requests=len(off), wrong=count, largest=max(off))
        wrong += count
        if not count:
            equal(
                served.serve(stream, chunk), Replayed(engine, mode, "python").serve(stream, chunk)
            )
    counts = engine.replayed()
    assert counts["replayed"] > 500 and counts["problems"] == []
    if wrong:
        raise DifferenceError(f"{wrong} requests differ")


def equal(ours: list[Run], theirs: list[Run]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.logits, b.logits)


@bites
def test_what_a_step_staged_is_gone_in_the_next(engine, model):
    """A medium in one step, which is staged in all rows of each step; and texts."""
    (one, *_), _ = streams_of(model)["images then texts"]
    texts = [Request((Text(5 + 7 * i, i),), max_tokens=4, joins_after=IDLE) for i in range(6)]
    for mode in REPLAYS:
        soak = Soak(Replayed(engine, mode, "poison"), Replayed(engine, "run"), LIMIT)
        soak.check([one, *texts])


@pytest.mark.parametrize(
    "model",
    [
        # As released, MOSS-Audio loses its levels wherever a graph is replayed: none is left.
        pytest.param(model, marks=getattr(pytest.mark, mark)("pr43617", "0.32.0"))
        for model in MODELS
        for mark in ["holds" if model == "moss_audio" else "bites"]
    ],
    indirect=True,
)
def test_the_prefix_cache_keeps_nothing_of_anothers_image(engine, model, figures):
    """A chat's first turn after another user's image. Its second turn comes later, in Python, where
    nothing is staged: as released, it begins with keys and values that are wrong."""
    turns = [Text(96, 60), Text(24, 61)]
    first, second = (Request(tuple(turns[:n]), 6, joins_after=IDLE) for n in (1, 2))
    (one, *_), _ = streams_of(model)["images then texts"]
    (right,) = engine.serve([second])
    engine.serve([one, first], CHUNK, "replay")
    (later,) = engine.serve([second], keep=True)
    figures(what="prefix cache", model=model, largest=(off := compare(later, right).largest))
    if off > LIMIT:
        raise DifferenceError(f"the second turn is {off:.2g} off")


@bites
def test_rows_in_the_order_of_model_runner_v1(engine, model, figures):
    """Decodes sit in rows that an image has left, too: images are wrong as well, as released."""
    engine.record(v2=False)
    soak = Soak(Replayed(engine, "replay"), Replayed(engine, "run"), LIMIT)
    (stream, _) = streams_of(model)["images then texts"]
    try:
        off = [difference.largest for difference in soak.differences(stream)]
    finally:
        engine.record()
    figures(what="V1's rows", model=model, wrong=sum(each > LIMIT for each in off))
    if max(off) > LIMIT:
        raise DifferenceError(f"{sum(each > LIMIT for each in off)} requests differ")


@pytest.mark.optional
@pytest.mark.parametrize("model", ["qwen3_vl", "qwen3_omni", "qwen3_vl_moe"], indirect=True)
@pytest.mark.parametrize("mode", REPLAYS)
def test_soak(engine, model, mode):
    soak = Soak(Replayed(engine, mode), Replayed(engine, "run"), LIMIT)
    kinds = ("image", "video", *(["audio"] if model == "qwen3_omni" else []))
    soak.run(kinds, 2000, seed=REPLAYS.index(mode))
    assert soak.requests >= 2000 and engine.replayed()["problems"] == []
