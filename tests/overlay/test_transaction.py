"""`apply` and `revert` on a live installation: killed, at once, without room."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys

import pytest

from tests import conftest
from vllm_deepstack import releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.patch import transaction
from vllm_deepstack.patch.tree import Tree

from .faults import MODELS, OTHER_USER, code, content, overlays


@pytest.fixture
def sources(release_sources):
    """With a RECORD, and with what Python compiled."""
    root = release_sources("0.22.1")
    info = root / "vllm-0.22.1.dist-info"
    info.mkdir()
    rows = [f"{path},sha256=x,1" for path in releases.known("0.22.1").sources]
    (info / "RECORD").write_text("".join(f"{row}\n" for row in [*rows, f"{info.name}/RECORD,,"]))
    cache = root / MODELS / "__pycache__"
    cache.mkdir()
    (cache / "other.cpython-311.pyc").write_bytes(b"compiled")
    return root


@pytest.mark.thinned
def test_killed_at_every_write(sources, tmp_path):
    """The code is never half of one version, and the next call leaves nothing behind."""
    thin = min(conftest.THIN, 5)  # or the last writes may be between two kills
    command = [sys.executable, "-m", "tests.overlay.faults", str(sources), str(tmp_path), str(thin)]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(faults) >= 300 // thin
    assert {owner for fault in faults for owner in fault["owners"]} == {os.geteuid() or OTHER_USER}
    assert [fault for fault in faults if not fault["found"]] == []
    expected = {"apply": ["newer"], "revert": ["stock"]}
    assert [f for f in faults if f["afterwards"] != expected[f["then"]]] == []
    for action, versions in {
        "apply": {"stock", "newer"},
        "revert": {"newer", "stock"},
        "apply over an older one": {"older", "newer"},
    }.items():
        found = {found for f in faults if f["action"] == action for found in f["found"]}
        assert found == versions


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_two_at_once(sources, verb, capsys):
    before = content(sources)
    handle = os.open(sources, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert main([verb, str(sources)]) == 1
    assert "another apply or revert is at work" in capsys.readouterr().err
    os.close(handle)
    assert content(sources) == before
    assert main(["apply", str(sources)]) == 0


@pytest.mark.parametrize("room", [100, 10_000, 100_000])
def test_no_room(sources, room):
    """Files may not grow beyond it: the system refuses to write, as on a full disk."""
    before = content(sources)
    command = [sys.executable, "-m", "vllm_deepstack", "apply", str(sources)]
    done = subprocess.run(
        command,
        cwd=releases.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr and "nothing was changed" in done.stderr
    assert content(sources) == before


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS])
def test_file_systems_that_cannot_exchange_folders(sources, monkeypatch, error):
    """File after file: overlayfs, or an old C library."""
    before = content(sources)
    Tree(sources).apply()
    after = content(sources)
    Tree(sources).revert()

    def exchange(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(transaction, "exchange", exchange)
    Tree(sources).apply()
    assert content(sources) == after != before
    Tree(sources).revert()
    assert content(sources) == before


def test_what_python_compiled_of_other_contents_goes(sources):
    """A .pyc is not always checked against its source (PEP 552)."""
    cache = sources / MODELS / "__pycache__"
    for verb in ("apply", "revert"):
        stale = cache / "qwen3_vl.cpython-311.pyc"
        stale.write_bytes(b"compiled")
        assert main([verb, str(sources)]) == 0
        assert not stale.exists()
        assert (cache / "other.cpython-311.pyc").exists()


def test_interrupted_diff_says_so(sources, capsys):
    Tree(sources).apply()
    Tree(sources).transaction.mark("applying")
    (sources / MODELS / "deepstack.py").unlink()
    assert main(["diff", str(sources)]) == 1
    assert "interrupted while applying" in capsys.readouterr().err
    assert main(["apply", str(sources)]) == 0
    assert code(content(sources))[f"{MODELS}/deepstack.py"]


def test_what_an_earlier_overlay_changed_and_this_one_does_not(sources, tmp_path):
    """Goes back with the same call, and RECORD says so."""
    older, newer = overlays(tmp_path)
    (older / MODELS / "qwen3_vl.py").write_text("DEEPSTACK = 1\n")
    (newer / MODELS / "moss_audio.py").unlink()  # which 0.22.1 does not have
    before = content(sources)
    Tree(sources, newer).apply()
    expected = code(content(sources))
    record = (sources / "vllm-0.22.1.dist-info/RECORD").read_text().splitlines()
    Tree(sources, newer).revert()

    Tree(sources, older).apply()
    Tree(sources, newer).apply()
    assert code(content(sources)) == expected
    now = (sources / "vllm-0.22.1.dist-info/RECORD").read_text().splitlines()
    listed = {line.split(",")[0] for line in now}
    assert {line.split(",")[0] for line in record} <= listed
    assert all((sources / path).is_file() for path in listed)
    Tree(sources, newer).revert()
    assert content(sources) == before
