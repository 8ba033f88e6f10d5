"""What passes of upstream's own tests on a release passes on the fork."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.upstream import own
from vllm_deepstack import ROOT, cli, releases
from vllm_deepstack.patch.tree import overlay_files

DEFAULT = str(releases.default().version)
CONTRACT = "tests/compile/test_deepstack_input_contract.py"
# The contract's test assigns the buffers.
REFUSE = """

def refuse(self, value):
    raise AttributeError("broken on purpose")


Qwen3VLForConditionalGeneration.deepstack_input_embeds = property(None, refuse)
"""


def test_default_release(unpacked, capsys):
    unpacked(DEFAULT)
    code = own.main([DEFAULT, "--quick"])
    assert code == 0, capsys.readouterr().out
    result = json.loads((own.WORK / f"{DEFAULT}-quick.json").read_text())
    outcomes = [(test["release"], test["fork"]) for test in result["tests"]]
    assert outcomes.count(("passed", "passed")) >= 118
    assert not result["breaches"]


def test_contract_and_a_fork_that_breaks_it(unpacked, tmp_path):
    """Without what the newest release requires: this test needs none of it."""
    newest = releases.known(str(max(releases.releases())))
    unpacked(str(newest.version))
    trees = [own.tree(newest, tmp_path / name, fork=True) for name in ("fork", "broken")]
    model = trees[1] / "vllm/model_executor/models/qwen3_vl.py"
    text = model.read_text()
    model.unlink()  # a link
    model.write_text(text + REFUSE)
    jobs = [own.Tests(tree, Path(sys.executable), [CONTRACT]) for tree in trees]
    fork, broken = own.run(jobs, Console(file=io.StringIO()))
    assert len(own.passed(fork)) == 1 and not own.passed(broken), fork
    ((test, why),) = own.lost(fork, broken)[0].items()
    assert own.file_of(test) == CONTRACT and "broken on purpose" in why


def test_what_is_wanted_or_was_not_run(monkeypatch):
    monkeypatch.setattr(own, "WANTED", {"test_b": "since"})
    release = {f"f.py::{t}": {"outcome": "passed", "why": ""} for t in ("test_a", "test_b[1-::]")}
    assert own.lost(release, {}) == (
        {"f.py::test_a": "was not run"},
        {"f.py::test_b[1-::]": "since"},
    )
    assert own.lost(release, release) == ({}, {})
    failed = {test: {"outcome": "failed", "why": "E"} for test in release}
    assert own.lost(failed, release) == ({}, {})


def test_every_model_of_the_overlay_is_looked_for():
    assert all(own.MODELS.search(path) for path in overlay_files(ROOT))


def test_errors(unpacked, tmp_path, capsys):
    assert cli.run(lambda: own.main(["9.9"])) == 2
    assert "unknown vLLM release 9.9" in capsys.readouterr().err
    tree = own.tree(releases.default(), tmp_path / "release", fork=False)
    job = own.Tests(tree, Path(sys.executable), ["tests/nowhere.py"])
    with pytest.raises(cli.UserError, match=r"not be run:(.|\n)*nowhere.py"):
        own.run([job], Console(file=io.StringIO()))
