"""Upstream's own tests that need a GPU, with small models, on the vLLM that is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.conftest import BUILD, version
from tools import package_index, releases
from tools.engines import import_path

# With what is chosen of it, and how many that is. The others' models have to be fetched from a hub;
# the small model's videos are not batch-invariant, as released either.
FILES = {
    "v1/determinism/test_batch_invariance_vlm.py": ("image or default", 3),
    "model_executor/test_sleep_mode_tensor_ownership.py": ("gemma3n", 1),
}


@pytest.mark.gpu
@pytest.mark.release(">=0.32")
@pytest.mark.timeout(600, func_only=True)
@pytest.mark.parametrize("file", FILES)
def test_upstreams_own(file, tmp_path, figures):
    """They pass on the release, too."""
    chosen, count = FILES[file]
    sources = package_index.unpack_sources(releases.known(version()), BUILD / "sdist")
    shutil.copytree(sources / "tests", tmp_path / "tests")  # beside them, `vllm` is what they test
    model, report = tmp_path / "model", tmp_path / "report.xml"
    # In a process of its own: PyTorch's threads do not survive a fork.
    make = [sys.executable, "-m", "tests.tiny_models", "qwen3_vl", str(model)]
    subprocess.run(make, env=import_path(), check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    command += [f"--junit-xml={report}", f"tests/{file}"]
    env = os.environ | {"VLLM_VLM_TEST_MODEL": str(model), "VLLM_CACHE_ROOT": str(tmp_path / "c")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot()[0].attrib
    passed = int(suite["tests"]) - int(suite["skipped"])
    figures(what="upstream's own", mode=file, passed=passed, of=count)
    assert passed == count, json.dumps(suite)
