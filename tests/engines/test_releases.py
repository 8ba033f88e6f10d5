"""Other releases than the one that is built on by default, on engines: the README's commands."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.conftest import BUILD
from tests.overlay.defects import DEFECTS
from vllm_deepstack import releases

pytestmark = [pytest.mark.engine, pytest.mark.optional, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("version", ["0.21.0", "0.32.0"])
def test_parity(version):
    """D1 shows on the stock release where it has it, D2 elsewhere; the fork agrees with eager."""
    command = ["make", "parity", f"RELEASE={version}"]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stock, fork = (
        json.loads((BUILD / "parity" / version / f"{name}.json").read_text())
        for name in ("released", "fork")
    )
    assert stock["vllm"] == version
    assert fork["vllm"].startswith(f"{version}+deepstack.")
    for report in (stock, fork):
        assert sum(sample["images"] > 0 for sample in report["samples"]) == 4
        assert all(sample["image_tokens"] for sample in report["samples"] if sample["images"])
    _, released = DEFECTS["D1"].models["Qwen3-VL"]
    verdicts = {arm["mode"]: arm["verdict"] for arm in stock["arms"]}
    affected = released.contains(version)
    assert verdicts["default"] == ("diverges" if affected else "agrees")
    assert verdicts["replay"] == ("diverges" if affected else "leaks")
    assert [arm["verdict"] for arm in fork["arms"]] == ["agrees"] * 4


def test_plugin():
    """0.32.0 as released, with the plugin of its environment, in every process."""
    install = ["make", "install", "build/tiny/qwen3_vl", "RELEASE=0.32.0"]
    done = subprocess.run(install, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = ["build/env/0.32.0/bin/vllm-deepstack", "check", "--model", "build/tiny/qwen3_vl"]
    command += [
        "@tests/tiny_models.args",
        "--side-by-side",
        "--vllm",
        "build/stock/0.32.0",
        "--json",
    ]
    on = {"DEEPSTACK_DISABLE": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    on |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=releases.ROOT, env=os.environ | on, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["vllm"] == "0.32.0 with vllm-deepstack"


@pytest.mark.parametrize("bites", [True, False])
@pytest.mark.parametrize("file, count", [("test_replay.py", 23), ("test_newest.py", 9)])
def test_0_32_0(bites, file, count):
    """All six models replayed, and D16 to D19, as released and with the fork."""
    install = ["make", "install", "RELEASE=0.32.0"]
    done = subprocess.run(install, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    python = BUILD / "env" / "0.32.0" / "bin" / "python"
    command = [
        str(python),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--optional",
        "-k",
        "not soak",
    ]
    stock = {"PYTHONPATH": str(BUILD / "stock" / "0.32.0")} if bites else {}
    done = subprocess.run(
        [*command, f"tests/serving/{file}", *(["--bites", "0.32.0"] if bites else [])],
        cwd=releases.ROOT,
        env=os.environ | stock,
        capture_output=True,
        text=True,
    )
    # One of each is right as released: MOSS-Audio's prefix cache, and text alone over two stages.
    count += not bites
    outcome = f"{count} xfailed in" if bites else f"{count} passed"
    assert done.returncode == 0 and outcome in done.stdout, done.stdout + done.stderr


def test_soak():
    """Of 0.32.0, with its own PyTorch: Qwen3-Omni is sent prompts that end in media and such as
    mix them with `prompt_embeds`, and goes on serving (D12)."""
    install = ["make", "install", "RELEASE=0.32.0"]
    done = subprocess.run(install, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    python = BUILD / "env" / "0.32.0" / "bin" / "python"
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["tests/serving/test_cpu_engines.py::test_soak[qwen3_omni]"]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
