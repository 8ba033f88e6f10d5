"""`apply` and `revert` on a live installation: killed, at once, without room."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest
from vllm_deepstack import releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.merged import table
from vllm_deepstack.patch import transaction
from vllm_deepstack.patch.tree import MIXIN, OVERLAY, Tree, in_order, overlay_files

from .faults import MODELS, OTHER_USER, code, content, overlays


@pytest.fixture
def installation(release_sources):
    """With a RECORD."""

    def make(version: str) -> Path:
        root = release_sources(version)
        info = root / f"vllm-{version}.dist-info"
        info.mkdir()
        rows = [f"{path},sha256=x,1" for path in content(root)]
        (info / "RECORD").write_text("".join(f"{r}\n" for r in [*rows, f"{info.name}/RECORD,,"]))
        return root

    return make


@pytest.fixture
def sources(installation):
    """With what Python compiled."""
    root = installation("0.22.1")
    cache = root / MODELS / "__pycache__"
    cache.mkdir()
    (cache / "other.cpython-311.pyc").write_bytes(b"compiled")
    return root


UNSHARED = ("unshare", "--mount")  # a mount ends with the processes that see it


def can_layer(folder: Path) -> bool:
    """Whether an overlay file system can be mounted here."""
    if not shutil.which("unshare"):
        return False
    for name in ("lower", "upper", "work", "mounted"):
        (folder / name).mkdir()
    layers = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(folder / "mounted")]
    return not subprocess.run([*UNSHARED, *mount], capture_output=True).returncode


@pytest.mark.thinned
@pytest.mark.parametrize("layered", [(), ("overlay",)], ids=["copied", "overlayfs"])
@pytest.mark.parametrize("version", ["0.22.1", "0.32.0"])
def test_killed_at_every_write(installation, tmp_path, version, layered):
    """What is there can be imported, and the next call finishes or takes back."""
    if layered and not can_layer(tmp_path):
        pytest.skip("no overlay file system can be mounted here: no root, or no such module")
    thin = min(conftest.THIN, 5)  # or the last writes may be between two kills
    folder, tree = tmp_path / "faults", str(installation(version))
    folder.mkdir()
    command = [sys.executable, "-m", "tests.overlay.faults", tree, str(folder), str(thin), *layered]
    command = [*(UNSHARED if layered else ()), *command]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = [json.loads(line) for line in done.stdout.splitlines()]
    assert {owner for fault in faults for owner in fault["owners"]} == {os.geteuid() or OTHER_USER}
    assert [fault for fault in faults if fault["broken"]] == []
    expected = {"apply": ["newer"], "revert": ["stock"]}
    assert [f for f in faults if f["afterwards"] != expected[f["then"]]] == []
    for action in ("apply", "revert", "apply over an older one"):
        stops = {f["merged"] for f in faults if f["action"] == action}
        count = int(max(stops).split()[-1])
        assert len(stops) > count - (thin > 1) and count > 6  # a deletion is one write


@pytest.mark.parametrize("order", [[], ["backwards"]], ids=["in order", "backwards"])
def test_what_a_kill_leaves_can_be_imported(stock_tree, order):
    """Each of the first so many files beside the release's others, as well as the release is."""
    command = [sys.executable, "-m", "tests.overlay.prefixes", str(stock_tree), *order]
    env = os.environ | {"PYTHONPATH": f"{stock_tree}:{releases.ROOT}"}
    done = subprocess.run(command, cwd=releases.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    released, *prefixes = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(prefixes) > 6
    assert (set(prefixes) == {released}) == (not order)


def test_what_is_needed_comes_first():
    """In every release."""
    order = in_order(overlay_files(OVERLAY))
    assert order[0] == MIXIN
    for path, of in table().files.items():
        for need in {need for file in of.values() for need in file.needs}:
            assert order.index(need) < order.index(path)


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


def test_what_python_compiled_of_other_contents_goes(sources, monkeypatch):
    """A .pyc is not always checked against its source (PEP 552). It goes before the file comes: the
    call after a kill leaves alone what is there already."""
    cache = sources / MODELS / "__pycache__"
    stale = cache / "qwen3_vl.cpython-311.pyc"
    replace, replaced = transaction.replace, []

    def watched(file, *rest):
        if file == sources / MODELS / "qwen3_vl.py":
            replaced.append(stale.exists())
        replace(file, *rest)

    monkeypatch.setattr(transaction, "replace", watched)
    for verb in ("apply", "revert"):
        stale.write_bytes(b"compiled")
        assert main([verb, str(sources)]) == 0
        assert not stale.exists()
        assert (cache / "other.cpython-311.pyc").exists()
    assert replaced == [False, False]


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
