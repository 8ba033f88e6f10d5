"""Which tests run, and what is said of those that do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import rotated
from vllm_deepstack import ROOT

TEST = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_it(number):
    if number == 1:
        pytest.skip("no such machine")

@pytest.mark.gpu
def test_on_a_gpu(): ...
"""


def run(folder: Path, *options: str) -> str:
    (folder / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "tests.conftest"]
    command += ["-m", "not gpu", "--untested", str(folder / "untested"), *options, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_was_not_tested_comes_last(tmp_path):
    (tmp_path / "untested").write_text("4\tan earlier run's\n")
    end = run(tmp_path).split(" not tested on this machine ")[1]
    lines = [
        "4 tests: an earlier run's",
        "1 test: needs a GPU: `make test-gpu`",
        "1 test: no such machine",
    ]
    assert end.splitlines()[1:4] == lines
    assert run(tmp_path).split(" not tested on this machine ")[1].splitlines()[1:4] == lines


def test_time_is_up(tmp_path):
    assert "3 tests: no time left today" in run(tmp_path, "--minutes", "0.0001")


def test_a_week_sees_all():
    items = [SimpleNamespace(path=f"file {number // 9}") for number in range(100)]
    for day in range(7):
        found = rotated(items, day)
        assert sorted(map(id, found)) == sorted(map(id, items))
        assert found[0].path != found[-1].path  # a file's tests stay together
    begins = {items.index(rotated(items, day)[0]) for day in range(7)}
    assert len(begins) == 7 and max(begins) > 80
