"""The traffic of benchmarks/exposure, what it counts as wrong, and all of it on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers

from benchmarks.exposure import __main__ as exposure
from benchmarks.exposure.traffic import LENGTHS, MEAN, Cell, Request, joining, requests
from tests import tiny_models
from vllm_deepstack import ROOT
from vllm_deepstack.check.compare import Run
from vllm_deepstack.check.modes import BATCH_INVARIANT, BREAKABLE
from vllm_deepstack.check.probes import IDLE

POISSON = Cell("poisson", 4, 0.5)
LOCK_STEP = replace(POISSON, arrivals="lock-step")


@pytest.mark.parametrize("in_flight", [1, 2, 4, 16, 64])
def test_as_many_are_in_flight_as_asked(in_flight):
    """On average. (An engine leaves out the steps in which nobody is.)"""
    sent = requests(replace(POISSON, in_flight=in_flight, requests=20_000))
    joined = np.cumsum([request.joins_after for request in sent])
    ended = joined + [request.max_tokens for request in sent]
    assert (ended - joined).sum() / ended.max() == pytest.approx(in_flight, rel=0.03)


def test_lengths_are_drawn():
    lengths = [request.max_tokens for request in requests(replace(POISSON, requests=2000))]
    assert (min(lengths), max(lengths)) == LENGTHS
    assert np.mean(lengths) == pytest.approx(MEAN, rel=0.03)


def test_lock_step_joins_and_ends_together():
    sent = requests(LOCK_STEP)
    assert {request.max_tokens for request in sent} == {MEAN}
    assert [request.joins_after for request in sent] == [IDLE, 0, 0, 0] * 65
    assert [request.image for request in sent] == [False, True] * 130


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_seed_says_what_is_asked_whoever_is_in_flight(share):
    cells = [Cell("poisson", 4, share), Cell("poisson", 64, share), replace(LOCK_STEP, share=share)]
    asked = [[(each.image, each.max_tokens) for each in requests(cell)] for cell in cells]
    assert asked[0] == asked[1]
    assert [sum(image for image, _ in each) for each in asked] == [260 * share] * 3
    assert requests(cells[0]) == requests(cells[0]) != requests(replace(cells[0], seed=1))


@pytest.fixture(scope="module")
def tokenizers():
    nano = transformers.AutoTokenizer.from_pretrained(ROOT / "benchmarks/geo3k_nano/model")
    return [nano, tiny_models.make_tokenizer()]


def test_prompts_are_of_any_vocabulary(tokenizers):
    for tokenizer in tokenizers:
        cell = replace(POISSON, requests=40, system=30)
        prompts = [each.prompt() for each in joining(cell, tokenizer)]
        again = [each.prompt() for each in joining(cell, tokenizer)]
        ids = [each["prompt_token_ids"] for each in prompts]
        assert ids == [each["prompt_token_ids"] for each in again]
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        marks = [each.count(image) for each in ids]
        assert marks == [int("multi_modal_data" in each) for each in prompts]
        assert sum(marks) == 20
        assert max(map(max, ids)) < len(tokenizer) and max(map(len, ids)) < 300
        assert len({tuple(each[:33]) for each in ids}) == 1  # the system prompt
        assert len({tuple(each) for each in ids}) > 20  # texts, and the wordings of a question


def test_sizes_of_images(tokenizers):
    def longest(cell: Cell) -> list[int]:
        prompts = (each.prompt() for each in joining(cell, tokenizers[0]))
        images = (p["multi_modal_data"]["image"][0] for p in prompts if "multi_modal_data" in p)
        return [max(image.size) for image in images]

    assert max(longest(replace(POISSON, requests=40))) <= 224
    large = longest(replace(POISSON, requests=40, side=1024))
    assert min(large) >= 224 and 900 < max(large) <= 1024


def run(*tokens: int, off: float = 0.0) -> Run:
    return Run(np.array(tokens), np.full((len(tokens), 8), off, np.float32))


def test_wrong_requests_are_counted_by_kind():
    sent = [Request(i, i >= 3, 2, 0) for i in range(5)]
    right = [run(1, 2)] * 5
    ours = [run(1, 2), run(1, 2, off=0.1), run(1, 3, off=0.5), run(1, 2, off=np.nan), run(1, 2)]
    found = exposure.judged(sent, ours, right, 0.25)
    counts = {"wrong_texts": 1, "texts": 3, "wrong_images": 1, "images": 2, "other_answers": 1}
    rows = [0.0, pytest.approx(0.1), 0.5, np.inf, 0.0]
    assert found == counts | {"largest": np.inf, "limit": 0.25, "rows": rows}
    assert exposure.judged(sent[:2], ours[:2], right[:2], 0.0)["wrong_texts"] == 1


def test_a_mode_is_compared_with_eager_of_the_same_arithmetic():
    triton = exposure.eager(exposure.BY_NAME["full-triton"])
    assert triton.options == ("--enforce-eager", "--attention-backend", "TRITON_ATTN")
    assert exposure.eager(BATCH_INVARIANT).env == BATCH_INVARIANT.env
    assert exposure.eager(BREAKABLE) == exposure.eager(exposure.BY_NAME["default"])


def entry(in_flight: int, **values) -> dict:
    counts = {"wrong_texts": 3, "texts": 5, "wrong_images": 0, "images": 5}
    cell = vars(replace(POISSON, in_flight=in_flight))
    return {"model": "m", "mode": "breakable", "vllm": "released"} | cell | counts | values


def test_results_are_merged_and_shown():
    before = exposure.merged({"runs": [], "entries": []}, {"cpu": "a"}, [entry(1), entry(4)])
    new = [entry(4, wrong_images=2), entry(2, error="out of memory")]
    after = exposure.merged(before, {"cpu": "b"}, new)
    assert [(each["in_flight"], each["run"]) for each in after["entries"]] == [
        (1, 0),
        (4, 1),
        (2, 1),
    ]
    lines = exposure.table(after["entries"]).splitlines()
    traffic = "| m | breakable | released | 50% small images, poisson |"
    assert lines[2:] == [
        f"{traffic} texts | 3 of 5 | failed | 3 of 5 |",
        f"{traffic} images | 0 of 5 | failed | 2 of 5 |",
    ]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--modes", "replay", "default"], "replay is for a CPU"),
        (["--vllm", "released=nowhere"], "does not contain vllm/"),
        (["--model", "m=nowhere"], "no config.json"),
    ],
)
def test_bad_input_is_a_clear_error(arguments, error, tmp_path, capsys):
    given = ["--model", "m=benchmarks/geo3k_nano/model", "--output-dir", str(tmp_path), *arguments]
    assert exposure.main(given) == 2
    assert error in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.optional
@pytest.mark.timeout(1200)
def test_no_request_is_wrong_in_replay(models, tmp_path):
    command = [sys.executable, "-m", "benchmarks.exposure", "--vllm", "fork"]
    command += ["--model", f"qwen3_vl={models['qwen3_vl']}", "--modes", "replay", "replay-decode"]
    command += ["--in-flight", "2", "8", "--requests", "24", "--output-dir", str(tmp_path)]
    command += ["--", "--max-num-batched-tokens", "512", "--max-num-seqs", "256"]
    command += ["--max-model-len", "512"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    found = json.loads(Path(tmp_path, "results.json").read_text())["entries"]
    assert [each.get("error") for each in found] == [None] * 4
    assert all(each["replayed"] > 10 and not each["problems"] for each in found)
    assert [(each["largest"], each["other_answers"]) for each in found] == [(0, 0)] * 4
