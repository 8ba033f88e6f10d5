"""The speed benchmarks: what they lay out, how they fail, and that the page is theirs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby, pairwise, permutations

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed import deepstack, page, serving, staging, tools
from benchmarks.speed.models import SHAPES, write
from benchmarks.speed.workers import Variant, workers
from vllm_deepstack import cli
from vllm_deepstack.cli import UserError


def test_page_has_what_the_results_say():
    """`python -m benchmarks.speed.page` writes it."""
    text = (page.HERE / "README.md").read_text()
    assert page.filled(text) == text
    assert "<!-- " in text


@given(st.integers(1, 5000), st.floats(0.001, 1), st.integers(1, 1024))
def test_a_steps_images(tokens, share, image_tokens):
    lengths, mask = staging.lay_out(tokens, share, image_tokens)
    assert len(mask) == tokens
    assert mask.sum() == sum(lengths) == max(1, round(tokens * share))
    assert max(lengths) <= image_tokens and max(lengths) - min(lengths) <= 1
    if share <= 0.5 and tokens >= 2 * len(lengths):
        runs = [len(list(run)) for staged, run in groupby(mask.tolist()) if staged]
        assert runs == lengths


def test_floor_is_a_read_a_write_and_a_cleared_row():
    assert sum(deepstack.floor(10, 2048, 3).values()) == 3 * (10 * 2048 * 3 * 2)


@pytest.mark.parametrize("name", SHAPES)
def test_vllm_knows_the_shapes(name, tmp_path):
    """Three DeepStack levels, images of 1024 tokens, 16 of them in a prompt."""
    from vllm.engine.arg_utils import EngineArgs

    model = write(name, tmp_path)
    config = EngineArgs(model=str(model), max_model_len=20480).create_model_config()
    assert config.is_multimodal_model
    vision = getattr(config.hf_config, "thinker_config", config.hf_config).vision_config
    assert len(vision.deepstack_visual_indexes) == 3
    assert vision.out_hidden_size == config.get_hidden_size()


@pytest.mark.parametrize(
    "module, arguments, error",
    [
        (serving, ["--model", "qwen3_vl_3b"], "qwen3_vl_3b: no folder, and none of qwen3_vl_2b"),
        (serving, ["--model", "qwen3_vl_2b", "--vllm", "a=nowhere"], "does not contain vllm/"),
        (serving, ["--model", "qwen3_vl_2b", "--eager", "b"], "--eager b: --vllm names fork"),
        (serving, ["--model", "qwen3_vl_2b", "--vllm", "a", "a"], "two have the same name"),
        (deepstack, [], "there is no GPU"),
    ],
)
def test_bad_input_is_a_clear_error(module, arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert module.main([*arguments, "--output-dir", str(tmp_path)]) == 2
    assert error in capsys.readouterr().err.replace("\n", " ")
    assert not any(tmp_path.iterdir())


def test_a_worker_that_fails_says_why(tmp_path):
    named = [Variant("fork", None)]
    with workers(named, "tests.parity.broken_worker", tmp_path) as (worker,):
        worker.start()
        with pytest.raises(UserError, match="exit code 1"):
            worker.ask("start", options=[])
    assert (tmp_path / "fork.log").exists()


def test_a_worker_takes_no_time_from_others():
    with workers([Variant("fork", None)], "tests.speed.spinning_worker", None) as (worker,):
        worker.start()
        worker.ask("start")
        before = worker.ask("cpu_seconds")
        time.sleep(1)
        assert worker.ask("cpu_seconds") - before < 0.5


SUDDEN_END = """
import os
from benchmarks.speed.workers import Variant, workers
with workers([Variant("fork", None)], "tests.speed.spinning_worker", None) as (worker,):
    worker.start()
    print(worker.ask("start"), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_no_worker_outlives_its_benchmark(tmp_path):
    """However that ends: a process that is stopped would keep its memory for good."""
    command = [sys.executable, "-c", SUDDEN_END]
    env = os.environ | {"TMPDIR": str(tmp_path)}  # nobody else cleans up
    killed = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, env=env)
    assert killed.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int(killed.stdout))
        deadline = time.monotonic() + 30
        while worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.1)


def test_an_engine_follows_each_of_the_others_alike():
    names, random = "abcd", np.random.default_rng(0)
    with workers([Variant(name, None) for name in names], "", None) as engines:
        turns = [serving.in_turn(engines, random, turns) for turns in (12, 1, 1) * 6]
        order = [engine.variant.name for one in turns for engine in one]
    assert [sorted(order[i : i + 4]) for i in range(0, len(order), 4)] == [list(names)] * 84
    followed = Counter(pairwise(order))
    assert all(followed[pair] > 10 for pair in permutations(names, 2))


def test_parts_of_a_command_begin_where_its_lines_begin():
    script = "import time, sys\nfor line in ('one', 'two\\n', 'three\\n'):\n"
    script += "    time.sleep(0.3); sys.stdout.write(line)"
    command = [sys.executable, "-c", f"print()\n{script}"]
    told = tools.run(command, {"onetwo": "first", "three": "second"})
    assert list(told["parts"]) == ["Python", "first", "second"]
    assert sum(told["parts"].values()) == pytest.approx(told["seconds"])
    assert all(earlier > 0 for earlier, _ in pairwise(told["parts"].values()))
    with pytest.raises(UserError, match="exit code 3:\nwhy"):
        tools.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], {})


def test_overlay_apply_is_taken_apart_and_taken_back(stock_tree, tmp_path):
    tree = shutil.copytree(stock_tree, tmp_path / "tree", copy_function=shutil.copyfile)
    before = {file: file.read_bytes() for file in tree.rglob("models/qwen3*.py")}
    told = tools.apply(tree, repeats=1)
    assert sum(told["parts"].values()) == pytest.approx(told["seconds"])
    assert {file: file.read_bytes() for file in tree.rglob("models/qwen3*.py")} == before


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.optional
def test_serving_on_two_engines(models, stock_tree, tmp_path, monkeypatch):
    """In turn, the release and the fork; the release is what ratios are to."""
    measured, written = [], []
    shown, write = serving.shown, cli.write_json
    monkeypatch.setattr(serving, "shown", lambda result: measured.append(result) or shown(result))
    monkeypatch.setattr(
        cli, "write_json", lambda *what: written.append(what[0]["rounds"]) or write(*what)
    )
    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-batched-tokens", "256"]
    sizes = ["--batch-sizes", "1", "2", "--images", "1", "2", "--image-size", "128"]
    sizes += ["--steps", "4", "--rounds", "2"]
    named = ["--vllm", f"stock={stock_tree}", "fork", "--gpu-memory-utilization", "0.3"]
    model = ["--model", str(models["qwen3_vl"]), "--output-dir", str(tmp_path)]
    assert serving.main([*model, *named, *sizes, *options, "--logs", str(tmp_path / "logs")]) == 0
    assert written == [0, 1, 2]  # a run that is stopped leaves what it has done
    result = json.loads((tmp_path / "serving-qwen3_vl.json").read_text())
    assert (tmp_path / "serving-qwen3_vl.png").stat().st_size > 10_000
    assert {name: "deepstack" in told["vllm"] for name, told in result["vllm"].items()} == {
        "stock": False,
        "fork": True,
    }
    titles = ["decode, batch 1", "decode, batch 2", "first token, 1 image"]
    titles += ["prefill, 2 × 1 image", "first token, 2 images"]
    assert [row["workload"] for row in result["rows"]] == [t for t in titles for _ in range(2)]
    for row in result["rows"]:
        assert row["seconds"]["low"] > 0
        assert row["vllm"] == "fork" or row["ratio"]["median"] == 1
    for workload in measured[-1]["workloads"]:
        times = 2 * workload["turns"]
        assert [len(rounds) for rounds in workload["rounds"].values()] == [times, times]
        if workload["action"] == "prefill":
            # 128 pixels a side are 16 image tokens.
            told = workload["rounds"]["fork"][0]
            tokens = workload["requests"] * workload["images"] * 16
            assert tokens < told["prompt_tokens"] < 3 * tokens + 64


@pytest.mark.gpu
def test_a_path_on_a_gpu():
    """The floor's bytes are moved, and not many times as many."""
    told = staging.Staging().path(
        tokens=512, hidden=256, levels=3, share=0.5, image_tokens=128, repeats=3, seed=0
    )
    least = deepstack.floor(256, 256, 3)
    assert 1 < told["moved"]["split and stage"]["bytes"] / least["split and stage"] < 6
    assert 1 <= told["moved"]["clear"]["bytes"] / least["clear"] <= 2  # or all tokens' rows
    assert told["busy_seconds"] < told["seconds"] < 1
