"""What still goes wrong on the newest releases (D16 to D20), on CPU engines that have it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from tests import tiny_models
from tests.conftest import version
from vllm_deepstack.check.compare import TOLERANCE, compare
from vllm_deepstack.check.processes import bound
from vllm_deepstack.patch.verbs import installed

from .engine import Engine
from .soak import DifferenceError, Soak, oracle_options, served_options
from .streams import Audio, Embeds, Picture, Request, Text
from .test_gpu_leaks import streams
from .test_gpu_models import DUMMY, Heard
from .test_replay import CORES, MEMORY, REPLAYS, Replayed, equal, lacking

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
bites, release = pytest.mark.bites, pytest.mark.release
LIMIT = TOLERANCE["float32"]
TEXT = Request((Text(12, 3),), max_tokens=4)
DRAWN = ("moss_audio", "ernie4_5_vl")  # have no checkpoint's weights
NO_IMAGES = ("--limit-mm-per-prompt", '{"image": 0, "video": 0}')
NO_VIDEOS = ("--limit-mm-per-prompt", '{"image": 3, "video": 0}')
STAGES = ("--pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, Path] = {}

    def checkpoint(model: str) -> Path:
        if reason := lacking(model):
            pytest.skip(reason)
        make = (tiny_models.MODELS | tiny_models.OTHERS)[model]
        if model not in made:
            made[model] = make(tmp_path_factory.mktemp("models") / model)
        return made[model]

    return checkpoint


@pytest.fixture
def start(checkpoint, tmp_path):
    """`start(model, *options)`, on one core, or on two as two workers. All stop with the test."""
    engines: list[Engine] = []
    cores = itertools.cycle(CORES)

    def start(model: str, *options: str, eager: bool = True, **kind: Any) -> Engine:
        made = oracle_options if eager else served_options
        every = [*made(checkpoint(model), "float32"), *options, *MEMORY]
        every += DUMMY if model in DRAWN else ()
        two = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES))}
        env = two if "2" in options else bound([next(cores)])
        env |= {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        engines.append(Engine(f"{model}-{len(engines)}", every, tmp_path, **env | kind))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def differ(soak: Soak, what: str, figures: Any, **about: Any) -> None:
    """Raises DifferenceError unless each request gets what it gets alone, in all streams."""
    wrong = 0
    for name, (stream, chunk) in streams(then_text=False).items():
        off = [difference.largest for difference in soak.differences(stream, threshold=chunk)]
        count = sum(each > LIMIT for each in off)
        figures(what=name, requests=len(off), wrong=count, largest=max(off), **about)
        wrong += count
    if wrong:
        raise DifferenceError(f"{what}: {wrong} requests differ")


@bites("0.32.0")
@release(">=0.32")
@pytest.mark.parametrize("eager", [True, False])
def test_transformers_backend_has_the_levels(start, eager, figures):
    """D16. Judged by vLLM's own class."""
    own, theirs = start("qwen3_vl"), start("qwen3_vl", "--model-impl", "transformers", eager=eager)
    differ(Soak(theirs, own, LIMIT), "Transformers backend", figures, model="qwen3_vl")


@bites("stock", "0.32.0")
def test_replayed_image_tokens_go_to_experts_of_vision(start, figures):
    """D17; and D2, by which a mask that was left makes text an image's, or ends the engine."""
    engine = start("ernie4_5_vl", *NO_VIDEOS)
    assert engine.record()["warnings"] == []
    for mode in REPLAYS:
        soak = Soak(Replayed(engine, mode), Replayed(engine, "run"), LIMIT)
        differ(soak, mode, figures, model="ernie4_5_vl", mode=mode)
        stream, _ = streams(then_text=False)["images then texts"]
        equal(soak.served.serve(stream), Replayed(engine, mode, "python").serve(stream))
    assert engine.replayed()["problems"] == []


@bites("stock", "0.32.0")
@pytest.mark.optional
@pytest.mark.parametrize("model", ["ernie4_5_vl", "granite4_vision"])
def test_later_pipeline_stages_have_what_they_need(start, model, figures):
    """D17: their experts of vision have image tokens. D19: their levels arrive. Judged by one
    engine. Eager, a CPU's runner does not start the second (0.32.0)."""
    one, two = start(model, *NO_VIDEOS), start(model, *STAGES, *NO_VIDEOS, eager=False)
    differ(Soak(two, one, LIMIT), "two stages", figures, model=model)


@release(">=0.31")
@pytest.mark.optional
def test_later_pipeline_stages_of_text_alone(start):
    """A first stage that has no tower sends no levels."""
    one = start("granite4_vision")
    two = start("granite4_vision", *STAGES, *NO_IMAGES, eager=False)
    Soak(two, one, LIMIT).check([TEXT, TEXT])


@dataclass(frozen=True)
class Spelled(Embeds):
    """A text's embeddings in place of its tokens, `[tokens, hidden_size]`."""

    vectors: tuple[tuple[float, ...], ...] = ()

    def content(self, hidden_size: int) -> torch.Tensor:
        return torch.tensor(self.vectors)


@torch.inference_mode()
def look_up(model: Any, ids: list[int]) -> tuple[tuple[float, ...], ...]:
    (embedding,) = [m for name, m in model.named_modules() if name.endswith("embed_tokens")]
    return tuple(map(tuple, embedding(torch.tensor(ids)).tolist()))


def prune(llm: Any) -> None:
    """As a GPU's runner, when it has loaded the model. A CPU's forgets it, and an image ends it."""
    llm.collective_rpc(prunes)


def prunes(worker: Any) -> None:
    worker.model_runner.is_multimodal_pruning_enabled = True


@pytest.mark.parametrize(
    "model, options",
    [
        pytest.param(model, options, marks=bites(*variants))
        for model, options, variants in [
            ("granite4_vision", (), ["0.32.0"]),
            ("moss_audio", (), ["0.32.0"]),
            ("qwen3_vl", ("--video-pruning-rate", "0.5"), ["stock", "0.32.0"]),
            ("cohere_compass", ("--video-pruning-rate", "0.5"), ["0.32.0"]),
        ]
    ],
)
def test_prompt_embeds_beside_media_are_text(start, model, options):
    """D18: such a request ended the engine, for everybody."""
    engine = start(model, "--enable-prompt-embeds", *options)
    if options:
        engine.llm(prune)
    kind = Heard if model == "moss_audio" else Request
    medium = Audio(600, 1) if model == "moss_audio" else Picture(64, 96, 1)
    words = [Text(3, 1), Text(5, 2)]
    spelled = [
        Spelled(each.tokens, vectors=engine.model(partial(look_up, ids=each.ids())))
        for each in words
    ]
    # As released, 0.22.1 embeds their placeholders where no medium is beside them.
    only = [(0, Text(4))] if SpecifierSet(">=0.32").contains(version()) else []
    for parts in ((0, medium, 1, Text(4)), *only, (Text(4), medium, Text(2), 1)):
        texts, embeds = (
            kind(tuple(of[part] if isinstance(part, int) else part for part in parts), 4)
            for of in (words, spelled)
        )
        served, alone, text = engine.serve([embeds, texts, TEXT])
        assert compare(served, alone).largest < LIMIT
        (again,) = engine.serve([TEXT])
        assert compare(text, again).largest < LIMIT


def keeps_compiled_decoders(tree: Path) -> Path:
    """A copy of the imported vLLM, whose CPU engines save and load what they compile, as on a GPU.
    As released, they trace once; and a pass looks up operations that only a GPU's build has."""
    shutil.copytree(installed() / "vllm", tree / "vllm", copy_function=os.link)
    for name, before, after in (
        (
            "platforms/cpu.py",
            r" +compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE\n",
            "",
        ),
        (
            "compilation/passes/utility/fix_functionalization.py",
            r"torch\.ops\._C\.(\w+)\.default",
            r'getattr(getattr(torch.ops._C, "\1", None), "default", None)',
        ),
    ):
        file = tree / "vllm" / name
        text, count = re.subn(before, after, file.read_text())
        assert count, file
        file.unlink()  # it is the release's own, by a link
        file.write_text(text)
    return tree


@bites("stock")
@release("==0.22.1")
@pytest.mark.optional
@pytest.mark.parametrize("text_first", [True, False])
def test_engines_share_no_compiled_decoder_that_differs(start, tmp_path, text_first):
    """D20: one of text alone and a full one, in each order, on one cache; and each once more."""
    tree = keeps_compiled_decoders(tmp_path / "tree")
    passes = dict.fromkeys(("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant"), False)
    keep = ("--compilation-config", json.dumps({"compile_sizes": [], "pass_config": passes}))
    image = Request((Text(12), Picture(192, 160), Text(5)), max_tokens=4)
    oracle, logs = start("qwen3_vl"), list[str]()
    for only_text in [text_first, not text_first] * 2:
        engine = start(
            *("qwen3_vl", *keep, *(NO_IMAGES if only_text else ())),
            **{"eager": False, "tree": tree, "VLLM_USE_AOT_COMPILE": "1"},
        )
        Soak(engine, oracle, LIMIT).check([TEXT] if only_text else [image, TEXT])
        engine.stop()
        logs.append(engine.job.log.read_text())
    loaded = ["Directly load AOT compilation" in log for log in logs]
    assert loaded == [False, False, True, True]
