"""The check on broken variants, which are made here, on a GPU, and on a model without DeepStack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from tests import tiny_models
from tests.serving.soak import DifferenceError
from vllm_deepstack import ROOT
from vllm_deepstack.check.modes import EAGER, REPLAYS
from vllm_deepstack.check.report import leaked, report, sentences
from vllm_deepstack.check.run import arm_job, run, write_spec
from vllm_deepstack.check.samples import builtin
from vllm_deepstack.patch.tree import Tree
from vllm_deepstack.patch.verbs import installed

SCHEMA = json.loads((ROOT / "docs/schemas/check.json").read_text())
MIXIN, QWEN3_VL = (f"vllm/model_executor/models/{name}.py" for name in ("deepstack", "qwen3_vl"))
IN_FORWARD = "self._clear_deepstack_input_embeds(inputs_embeds.size(0))"
IN_FOUR = "self._clear_deepstack_input_embeds(4)"
STAGED = "self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)"
REBOUND = "self.deepstack_input_embeds = [torch.zeros_like(b) for b in self.deepstack_input_embeds]"
READ = "views = [b[start : start + num_tokens] for b in self._deepstack_buffers]"
WIPED = "[b[self.deepstack_input_embeds_num_tokens :].zero_() for b in self._deepstack_buffers]"
# In a fixed vLLM: what an eager engine of it does, the file, what stands there, and what stands
# there instead.
VARIANTS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "nothing is cleared": (
        "leaks",
        [(MIXIN, "buffer[: min(num_tokens, staged)].zero_()", "pass")],
    ),
    # As a graph does that was captured for a step of four tokens.
    "four rows are cleared": (
        "leaks",
        [(QWEN3_VL, STAGED, "pass"), (QWEN3_VL, IN_FORWARD, IN_FOUR)],
    ),
    "D5": ("agrees", [(MIXIN, STAGED, REBOUND)]),
    # As vllm-omni has it: rows that nobody staged are wiped, at capture all of them.
    "D22": ("agrees", [(MIXIN, READ, f"{WIPED}; {READ}")]),
}


def edit(tree: Path, edits: list[tuple[str, str, str]]) -> None:
    for file, old, new in edits:
        text = (tree / file).read_text()
        assert text.count(old) == 1
        (tree / file).unlink()  # it may be a link to the release's
        (tree / file).write_text(text.replace(old, new))


def small(model: Path) -> list[str]:
    options = ["--model", str(model), "--max-model-len", "512", "--max-num-batched-tokens", "512"]
    return [*options, "--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 2, "video": 0}']


def check(model: Path, folder: Path, *options: str, **more: str) -> tuple[int, dict[str, Any]]:
    """Runs the command: (exit code, report)."""
    command = [sys.executable, "-m", "vllm_deepstack", "check", *small(model), *options]
    files = {name: folder / f"check.{name}" for name in ("json", "html", "junit")}
    command += [part for name, file in files.items() for part in (f"--{name}", str(file))]
    env = os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache"), "HF_HUB_OFFLINE": "1"} | more
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert files["json"].exists(), done.stderr
    found = json.loads(files["json"].read_text())
    jsonschema.validate(found, SCHEMA)
    assert "<svg" in files["html"].read_text() and "<testsuite" in files["junit"].read_text()
    return done.returncode, found


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_broken_variants(models, stock_tree, tmp_path):
    """Of the fork, with one thing broken: on an eager engine, which runs the model's own Python at
    each step, text gets what an image has left. Replayed, images lose their levels, or text that is
    asked alone after images has those of them."""
    spec = write_spec(builtin(5, tmp_path), True, 4, tmp_path, probes=True)
    options = [*small(models["qwen3_vl"]), "--dtype", "float32", "--seed", "0"]
    options += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1"]
    options += ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too
    jobs = []
    for number, (name, (_, edits)) in enumerate(VARIANTS.items()):
        folder = tmp_path / str(number)
        half_written = shutil.ignore_patterns("*.pyc.*")  # by an engine that runs meanwhile
        tree = folder / "tree"
        shutil.copytree(stock_tree, tree, copy_function=os.link, ignore=half_written)
        Tree(tree).apply()
        edit(tree, edits)
        jobs.append(arm_job(EAGER, tree, options, folder, name, REPLAYS))
    results = run(jobs, spec, Console(stderr=True), at_once=2)
    for result, (name, (wanted, _)) in zip(results, VARIANTS.items()):
        assert result.meta["vllm"].endswith(" with vllm-deepstack")
        found = report(name, result, result.replays)
        jsonschema.validate(found, SCHEMA)
        eager, replay, decode = found["arms"]
        seconds = {arm["mode"]: arm["seconds"] for arm in found["arms"]}
        print(f"{name}: {leaked(eager)}, {seconds}", *sentences(eager)[:3], sep="\n  ")
        assert eager["verdict"] == wanted
        replayed = "leaks" if wanted == "leaks" else "diverges"
        assert replay["verdict"] == replayed and replay["alone"]["differ"] > 5
        assert decode["verdict"] in ("leaks", "diverges")
        if wanted == "leaks":
            assert leaked(eager) > 5
            assert "(text) changed by " in sentences(eager)[0] and "(image)" in sentences(eager)[0]
            assert eager["leaks"]["streams"][0]["requests"][0]["changed"] is False


def serve(folder: Path, model: Path, *line: str, modes: list[str]) -> tuple[int, str, Any]:
    """Checks a `vllm serve` line: (exit code, what it printed, report)."""
    file = folder / "line.json"
    command = [sys.executable, "-m", "vllm_deepstack", "check", "--modes", *modes]
    command += ["--num-samples", "3", "--json", str(file), "--", "vllm", "serve", str(model)]
    command += ["--max-model-len", "512", "--max-num-batched-tokens", "512", "--dtype", "float32"]
    command += ["--gpu-memory-utilization", "0.3", *line]  # of a CPU's memory, too
    env = os.environ | {"VLLM_CACHE_ROOT": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if not file.exists():
        return done.returncode, done.stdout + done.stderr, None
    found = json.loads(file.read_text())
    jsonschema.validate(found, SCHEMA)
    return done.returncode, done.stdout, found


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_line_that_people_serve_with(models, tmp_path):
    """Options of the server, a configuration file, a chat template, videos alone."""
    config, template = tmp_path / "serve.yaml", tmp_path / "chat.jinja"
    config.write_text("port: 8123\nserved-model-name: mine\n")
    template.write_text(models["qwen3_vl"].joinpath("chat_template.jinja").read_text())
    code, _, found = serve(
        tmp_path,
        models["qwen3_vl"],
        *("--config", str(config), "--chat-template", str(template), "--api-key", "secret"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--data-parallel-size", "2"),
        *("--limit-mm-per-prompt", '{"image": 0, "video": 1}'),
        modes=["replay"],
    )
    assert (code, found["verdict"], found["model"]) == (0, "agrees", str(models["qwen3_vl"]))
    (alone,) = [each for each in found["unanswered"] if "the server alone needs" in each]
    assert "--api-key" in alone and "--port" in alone and "--tool-call-parser" in alone
    assert "data parallel: one rank of 2 is checked" in found["unanswered"]
    assert found["shares"]["modality"] == "video" and found["shares"]["blank"] > 0.5
    streams = {each["name"] for each in found["arms"][1]["leaks"]["streams"]}
    assert {"video, then text", "video beside text, a token a step"} <= streams
    assert found["arms"][1]["ran"]["replayed"] > 100
    assert found["arms"][0]["noise"].keys() == {"whole prompts", "chunks", "a token a step"}


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_adapters_beside_requests_without(tmp_path):
    """On a CPU, 0.22.1 adds the last adapter to requests that have none, where one in their step
    has it: vllm-project/vllm#48421. With LoRA, its default mode compiles nothing there: it would be
    eager against itself, and is not run. Grammars are right."""
    model = tiny_models.qwen3_vl_assisted(tmp_path / "model")
    lora = ["--enable-lora", "--max-lora-rank", "8"]
    lora += ["--lora-modules", f"mine={model / 'decoder_adapter'}"]
    lora += ["--worker-extension-cls", "tests.serving.unpinned.Unpinned"]
    code, text, found = serve(
        tmp_path, model, *lora, "--limit-mm-per-prompt", '{"video": 0}', modes=["default"]
    )
    eager, default = found["arms"]
    assert default["verdict"] == "not run"
    assert "nothing was compiled or captured" in default["reason"]
    streams = {each["name"]: each["requests"] for each in eager["leaks"]["streams"]}
    adapters = streams.pop("with an adapter beside without")
    changed = [number for number, request in enumerate(adapters) if request["changed"]]
    assert len(changed) > 10 and all(number % 2 == 0 for number in changed)  # without an adapter
    assert len(streams["with a grammar beside without"]) > 40
    assert not any(request["changed"] for each in streams.values() for request in each)
    assert (code, found["verdict"]) == (1, "leaks")
    assert "eager: with an adapter beside without: request" in text


@pytest.mark.engine
@pytest.mark.optional
@pytest.mark.timeout(900)
def test_where_nothing_is_compiled_it_cannot_tell(models, tmp_path):
    """`-O0` is eager against itself: that was called agreement."""
    code, text, found = serve(tmp_path, models["qwen3_vl"], "-O0", modes=["default"])
    assert (code, found["verdict"]) == (2, "unknown")
    assert found["arms"][1]["verdict"] == "not run"
    assert "nothing was compiled or captured" in found["arms"][1]["reason"]
    assert "cannot tell" in text and "agrees (default)" not in text


@pytest.mark.engine
@pytest.mark.optional
@pytest.mark.timeout(900)
def test_a_pooling_model(models, tmp_path):
    """Its embeddings are compared, with images and without."""
    code, _, found = serve(
        tmp_path,
        models["qwen3_vl"],
        *("--runner", "pooling", "--limit-mm-per-prompt", '{"image": 2, "video": 0}'),
        modes=["default"],
    )
    assert (code, found["verdict"]) == (0, "agrees")
    assert found["shares"]["blank"] > 100 * found["tolerance"]
    assert len(found["arms"][1]["samples"]) == 3 and found["arms"][1]["alone"]["requests"] > 40


@pytest.mark.engine
def test_a_line_that_vllm_refuses(models, tmp_path):
    """By vLLM's own parser, and before an engine starts."""
    code, text, found = serve(tmp_path, models["qwen3_vl"], "--prot", "80", modes=["default"])
    assert (code, found) == (2, None) and "vllm serve: unrecognized arguments: --prot" in text


@pytest.mark.engine
@pytest.mark.optional
@pytest.mark.timeout(900)
def test_a_model_without_deepstack(tmp_path):
    """Qwen2.5-VL: it agrees, nothing leaks, and no share of levels is made up."""
    model = tiny_models.qwen2_5_vl(tmp_path / "model")
    code, found = check(model, tmp_path, "--dtype", "float32", "--side-by-side")
    assert (code, found["verdict"]) == (0, "agrees")
    assert len(found["arms"][1]["leaks"]["streams"][0]["requests"]) > 40
    assert found["shares"]["blank"] > 0.5 and found["shares"]["levels"] is None
    assert any("_get_deepstack_input_embeds" in text for text in found["unanswered"])


def gpu_check(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    memory = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**30)]
    model = tiny_models.MODELS["qwen3_vl"](folder / "model")
    return check(model, folder, "--dtype", "bfloat16", *memory, *options)


@pytest.mark.gpu
@pytest.mark.release(">=0.24")
@pytest.mark.bites("newest")
@pytest.mark.timeout(600, func_only=True)
def test_the_check_finds_what_graphs_leave(tmp_path, figures):
    """D2, in one run; in the modes in which 0.33.0 as released has it."""
    modes = ["default", "breakable", "batch-invariant"]
    code, found = gpu_check(tmp_path, "--modes", *modes)
    for arm in found["arms"]:
        figures(what="check", mode=arm["mode"], changed=leaked(arm), seconds=arm["seconds"])
    assert all(arm["verdict"] not in ("failed", "not run") for arm in found["arms"])
    wrong = [arm["mode"] for arm in found["arms"] if arm["verdict"] == "leaks"]
    if wrong == modes:
        assert code == 1
        raise DifferenceError(sentences(found["arms"][1])[0])
    assert (code, found["verdict"]) == (0, "agrees")


@pytest.mark.gpu
@pytest.mark.timeout(600, func_only=True)
def test_the_check_finds_rebound_storage(tmp_path, figures):
    """D5: graphs read the buffers that were there when they were captured."""
    shutil.copytree(installed() / "vllm", tmp_path / "tree/vllm")
    edit(tmp_path / "tree", [(MIXIN, STAGED, REBOUND)])
    code, found = gpu_check(tmp_path, "--vllm", str(tmp_path / "tree"))
    _, arm = found["arms"]
    figures(what="check, rebound", mode=arm["mode"], seconds=arm["seconds"], **arm["alone"])
    assert code == 1 and arm["alone"]["differ"] > 0
