"""Upstream's own tests that need a GPU, with small models, on the vLLM that is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.version import Version

from tests.conftest import BUILD, version
from tests.serving.soak import DifferenceError
from upstream.pulls import pulls
from vllm_deepstack import package_index, releases
from vllm_deepstack.check.processes import import_path

DETERMINISM = "v1/determinism/test_batch_invariance_vlm.py"
# With what is chosen of it, and how many that is. The others' models have to be fetched from a hub;
# the small model's videos are not batch-invariant, as released either.
FILES = {
    DETERMINISM: ("image or default", 3),
    "model_executor/test_sleep_mode_tensor_ownership.py": ("gemma3n", 1),
}


def run(
    folder: Path, file: str, chosen: str, model: str, changes: Mapping[str, bytes]
) -> tuple[int, dict[str, str], str]:
    """A file of a release's tests, with a tiny model: how many passed, pytest's counts, its output.

    `changes` are files of the tests by path, in place of the release's.
    """
    sources = package_index.unpack_sources(releases.known(version()), BUILD / "sdist")
    shutil.copytree(sources / "tests", folder / "tests")  # beside them, `vllm` is what they test
    for path, text in changes.items():
        (folder / path).write_bytes(text)
    report = folder / "report.xml"
    # In a process of its own: PyTorch's threads do not survive a fork.
    make = [sys.executable, "-m", "tests.tiny_models", model, str(folder / "model")]
    subprocess.run(make, env=import_path(), check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    command += [f"--junit-xml={report}", f"tests/{file}"]
    env = {"VLLM_VLM_TEST_MODEL": str(folder / "model"), "VLLM_CACHE_ROOT": str(folder / "c")}
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    suite = ElementTree.parse(report).getroot()[0].attrib
    bad = sum(int(suite[key]) for key in ("errors", "failures", "skipped"))
    return int(suite["tests"]) - bad, suite, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.release(">=0.32")
@pytest.mark.timeout(600, func_only=True)
@pytest.mark.parametrize("file", FILES)
def test_upstreams_own(file, tmp_path, figures):
    """They pass on the release, too."""
    chosen, count = FILES[file]
    passed, suite, output = run(tmp_path, file, chosen, "qwen3_vl", {})
    figures(what="upstream's own", mode=file, passed=passed, of=count)
    assert passed == count, output + json.dumps(suite)


@pytest.mark.gpu
@pytest.mark.bites("newest")
@pytest.mark.release("==0.33.0")
@pytest.mark.timeout(600, func_only=True)
def test_what_a_pull_request_adds_to_them(tmp_path, figures):
    """Of shapes for which vLLM switches breakable graphs on; on a Hopper."""
    release, path = Version("0.33.0"), f"tests/{DETERMINISM}"
    sources = package_index.unpack_sources(releases.known(str(release)), BUILD / "sdist")
    (pull,) = (pull for pull in pulls(release) if path in pull.overlay)
    before = {p: (sources / p).read_bytes() for p in pull.overlay if (sources / p).is_file()}
    changes = {path: pull.changes(before, release)[path]}
    passed, suite, output = run(tmp_path, DETERMINISM, "texts_and", "qwen3_vl_2b", changes)
    figures(what="a pull request's", mode=DETERMINISM, passed=passed, of=1)
    if "Batch invariance violated" in output:
        raise DifferenceError(output)
    assert passed == 1, output + json.dumps(suite)
