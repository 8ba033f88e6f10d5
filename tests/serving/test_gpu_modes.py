"""Ways to serve that are right, each on real engines: caches, offloading, speculation, adapters,
quantization, sleep, encoders in graphs, compiled or sharded.

One stream, whole and then with one token of a prompt in a step; each request's logits against the
same request's alone, on an eager engine. Of what vLLM might leave out in silence, that it was done
is asked of the engine. Data parallel is not here: `LLM` refuses it in one process.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import CHECKPOINT, DTYPE, Mode
from vllm_deepstack.check.compare import TOLERANCE

from .engine import sleep_and_wake
from .modes import cases
from .streams import Picture, Request, Text, Video
from .test_gpu_leaks import IDLE, OVERLAPPING, check, ends_in_image, texts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900, func_only=True)]

VL, OMNI, MOE, ASSISTED = "qwen3_vl", "qwen3_omni", "qwen3_vl_moe", "qwen3_vl_assisted"


def given(option: str, **values: Any) -> tuple[str, str]:
    return (option, json.dumps(values))


def speculative(method: str, folder: str) -> tuple[str, str]:
    model = f"{CHECKPOINT}/{folder}"
    return given("--speculative-config", method=method, model=model, num_speculative_tokens=3)


def blocks(count: str) -> tuple[str, str]:
    return ("--num-gpu-blocks-override", count)


compiled = partial(given, "--compilation-config")
GRAPHED = compiled(cudagraph_mm_encoder=True)
DATA = ("--mm-encoder-tp-mode", "data")
TWO_GPUS = ("--tensor-parallel-size", "2")
LORA = ("--enable-lora", "--max-lora-rank", "8")
TOWER_LORA = (*LORA, "--enable-tower-connector-lora")
PREFETCH = ("--offload-backend", "prefetch", "--offload-group-size", "2")
# So few blocks that others have taken them before a request comes again.
KV_OFFLOAD = ("--kv-offloading-size", "1", *blocks("48"))
DRAFTS = "spec_decode_num_drafts"
COMPILED_ENCODER = Mode(
    "compiled encoder",
    compiled(compile_mm_encoder=True),
    releases=">=0.32",
    lacking="of Qwen3-VL, 0.22.1 compiles no encoder, whatever it is told; 0.32.0 does",
)
ENCODER_CONNECTOR = Mode(
    "encoder connector",
    given(
        "--ec-transfer-config",
        ec_connector="ECExampleConnector",
        ec_role="ec_both",
        ec_connector_extra_config={"shared_storage_path": f"{CHECKPOINT}/ec"},
    ),
)


def crowd() -> list[Request]:
    """Eight at once, of 31 to 46 tokens, that go on for 40 and more."""
    requests = []
    for number in range(8):
        picture = Picture(128, 64 + 32 * (number % 3), 20 + number)
        parts = (Text(20, number), picture, Text(1 + number, number))
        requests.append(Request(parts, max_tokens=40 + number))
    return [replace(requests[0], joins_after=IDLE), *requests[1:]]


def stream(then_text: bool) -> list[Request]:
    """A text before and after images, alone and beside texts; prompts that end in an image (or,
    with `then_text`, in a text), short enough to end while texts decode; a video; a crowd."""
    text = Request((Text(12, 3),), 8, joins_after=IDLE)  # no whole block, which would be cached
    alone = Request((Picture(128, 96, 1),), 6, joins_after=IDLE)
    parts = (Text(40, 4), Picture(192, 160, 2), Text(5, 4))
    beside = [
        *texts(60, 2, IDLE, 16, 24),
        Request(parts, 8, joins_after=OVERLAPPING),
        *texts(61, 2, OVERLAPPING, 4, 9),
    ]
    last: list[Request] = []
    for number in range(3):
        last += texts(62 + number, 1 + number, IDLE, 18, 24)
        picture = Picture(64, 64 + 32 * (number % 2), 10 + number)
        last.append(ends_in_image((Text(3, number), picture), 1 + number, then_text))
        last += texts(66 + number, 1, OVERLAPPING, 4, 9)
    video = Request((Text(4, 5), Video(4, 5), Text(4, 6)), 6, joins_after=IDLE)
    return [text, alone, text, *beside, text, *last, text, video, text, *crowd(), text, *beside]


def reload(llm: Any) -> None:
    llm.collective_rpc("reload_weights")
    llm.llm_engine.reset_encoder_cache()  # workers have forgotten theirs, the scheduler has not


def doze(llm: Any) -> None:
    llm.sleep(level=1)
    llm.wake_up()


def sleep_deeply(llm: Any) -> None:
    sleep_and_wake(llm)
    reload(llm)


def forget_images(llm: Any) -> None:
    llm.llm_engine.reset_encoder_cache()


def metric(llm: Any, name: str) -> int:
    return sum(each.value for each in llm.get_metrics() if each.name == f"vllm:{name}")


def kept_on_disk(llm: Any) -> int:
    config = llm.llm_engine.vllm_config.ec_transfer_config.ec_connector_extra_config
    return len(list(Path(config["shared_storage_path"]).rglob("*.safetensors")))


def encoder_replays(llm: Any) -> int:
    return sum(llm.collective_rpc(replays))


def replays(worker: Any) -> int:
    runner = worker.model_runner
    if manager := getattr(runner, "encoder_cudagraph_manager", None):  # Model Runner V1
        return manager.graph_hits
    return runner.model_state.encoder_runner.cudagraph_manager.graph_hits


def row(mode: Mode, *models: str, common: tuple[str, ...] = (), **how: Any) -> list[Any]:
    """A mode of models; `how` is for `serve`."""
    return [
        pytest.param(case, how, id=str(case))
        for model in models
        for case in cases(model, modes=[mode], common=common)
    ]


ROWS = [
    # Encoders.
    *row(Mode("encoder graphs", GRAPHED), VL, proof=encoder_replays),
    *row(COMPILED_ENCODER, VL),
    *row(Mode("pruned videos"), VL, common=("--video-pruning-rate", "0.5")),
    # Once the engine has forgotten its images, it reads them from the disk.
    *row(ENCODER_CONNECTOR, VL, OMNI, acts=[forget_images], proof=kept_on_disk),
    # Speculation.
    *row(Mode("draft model", speculative("draft_model", "draft")), ASSISTED, proof=DRAFTS),
    *row(Mode("EAGLE3", speculative("eagle3", "eagle3")), ASSISTED, proof=DRAFTS),
    # Adapters, which the eager engine has, too.
    *row(Mode("decoder LoRA"), ASSISTED, common=LORA, adapter="decoder_adapter"),
    *row(Mode("tower LoRA"), ASSISTED, common=TOWER_LORA, adapter="tower_adapter"),
    # Compilation.
    *row(Mode("unbacked", compiled(dynamic_shapes_config={"type": "unbacked"})), VL, OMNI, MOE),
    *row(Mode("AOT", env=(("VLLM_USE_AOT_COMPILE", "1"),)), VL, OMNI),
    *row(Mode("no AOT", env=(("VLLM_USE_AOT_COMPILE", "0"),)), VL, OMNI),
    # Weights. Compiled and eager round differently, of which eight bits make up to 0.65 (H100).
    *row(Mode("fp8"), VL, common=("--quantization", "fp8"), limit=4 * TOLERANCE[DTYPE]),
    *row(Mode("UVA", ("--offload-backend", "uva", "--cpu-offload-gb", "1")), VL, OMNI),
    *row(Mode("prefetch", PREFETCH), VL, OMNI),
    *row(Mode("reloaded"), VL, OMNI, MOE, acts=[reload]),
    *row(Mode("sleep", ("--enable-sleep-mode",)), VL, OMNI, acts=[doze, sleep_deeply]),
    # Keys and values.
    *row(Mode("prefix cache", ("--enable-prefix-caching",)), VL, OMNI, proof="prefix_cache_hits"),
    # A prompt of 512 tokens fits; vLLM keeps a block for itself; `crowd` needs 44.
    *row(Mode("preempted", blocks("34")), VL, OMNI, proof="num_preemptions"),
    *row(Mode("KV offload", KV_OFFLOAD), VL, OMNI, proof="external_prefix_cache_hits"),
]
SHARDED = [
    *row(Mode("data-parallel encoder", (*TWO_GPUS, *DATA)), VL),
    *row(Mode("data-parallel graphs", (*TWO_GPUS, *DATA, *GRAPHED)), VL, proof=encoder_replays),
    *row(Mode("expert parallel", (*TWO_GPUS, "--enable-expert-parallel")), MOE, OMNI),
]


@pytest.fixture
def served(case, how, fleet, pytestconfig):
    # A prompt that ends in a placeholder ends an Omni engine as released (D12).
    requests = stream(then_text=case.model == OMNI and bool(pytestconfig.getoption("--bites")))
    if adapter := how.get("adapter"):
        return mixed(requests, fleet.oracle(case), fleet.checkpoints[case.model] / adapter)
    return requests


def mixed(requests: list[Request], oracle: Any, adapter: Path) -> list[Request]:
    """Every other request with an adapter; then, the others."""
    adapted = [replace(request, adapter=str(adapter)) for request in requests]
    (without,), (with_it,) = (oracle.serve([each[1]]) for each in (requests, adapted))
    difference = abs(without.logits[0] - with_it.logits[0]).max()
    assert difference > 0.5, "the adapter does not change the logits of an image"
    pairs = list(zip(requests, adapted))
    return [pair[(n + turn) % 2] for turn in (0, 1) for n, pair in enumerate(pairs)]


def serve(fleet, figures, case, served, acts=(), proof=None, limit=None, adapter="") -> None:
    """`acts`: what is done to the engine, each before the stream comes again. `proof`: what of the
    mode it can count, a metric or a function of the `LLM`."""
    check(fleet, case, served, figures, "whole prompts", limit=limit)
    for act in acts or (None,):
        what = "token by token"
        if act:
            fleet.engine(case).llm(act)
            what += f", after {act.__name__}"
        check(fleet, case, served, figures, what, limit=limit, threshold=1)
    if proof:
        ask = partial(metric, name=proof) if isinstance(proof, str) else proof
        assert fleet.engine(case).llm(ask), f"{case.mode.name}: nothing of it was done"


@pytest.mark.parametrize("case, how", ROWS)
def test_mode(case, how, served, fleet, figures):
    serve(fleet, figures, case, served, **how)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case, how", SHARDED)
def test_sharded_mode(case, how, served, fleet, figures):
    serve(fleet, figures, case, served, **how)
