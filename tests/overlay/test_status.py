"""`status`: the table release × defect, read from each release's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.version import Version

from tests.conftest import PR43617
from tools import releases
from tools.overlay.__main__ import main
from tools.overlay.defects import DEFECTS, MODELS
from tools.overlay.status import status
from tools.overlay.tree import STATE, Tree

from . import table
from .table import statuses

RELEASES = [str(version) for version in releases.releases()]
# Releases and defects as the project's design has them, measured or read.
PRESENT = {
    "D1": ("0.20.0", "0.22.1"),
    "D2": ("0.23.0", "0.33.0"),
    "D3": ("0.23.0", "0.27.1"),
    "D4": ("0.23.0", "0.33.0"),
    "D5": ("0.20.0", "0.33.0"),
    "D6": ("0.20.0", "0.33.0"),
    "D7": ("0.20.0", "0.33.0"),
    "D8": ("0.22.0", "0.23.0"),
    "D9": ("0.20.0", "0.33.0"),
    "D10": ("0.20.0", "0.20.1"),
    "D11": ("0.20.0", "0.29.0"),
}


def present(root: Path) -> set[str]:
    found = status(root)
    assert found.problem is None
    return set(table.present(found))


@pytest.fixture(scope="module")
def found(release_sources):
    return statuses({version: release_sources(version) for version in RELEASES})


@pytest.mark.parametrize("version", RELEASES)
def test_before_and_after(found, version):
    expected = {
        name
        for name, (first, last) in PRESENT.items()
        if Version(first) <= Version(version) <= Version(last)
    }
    before, after = found[version]
    assert before.problem is None
    assert set(table.present(before)) == expected
    assert expected == {name for name, d in DEFECTS.items() if d.released.contains(version)}
    assert (after.code, after.overlay) == (0, "applied")
    mended = {name for name, state in after.defects.items() if state == "mended by the overlay"}
    assert mended == expected


def test_readme_has_the_table(found):
    """`python -m tests.overlay.table` prints it."""
    assert table.table(found) in (releases.ROOT / "README.md").read_text()


def test_pull_request_43617_trades_defects(release_sources):
    root = release_sources("0.22.1")
    before = present(root)
    Tree(root, PR43617).apply()
    assert present(root) == before - {"D1"} | {"D2", "D3", "D4"}


def test_states_in_words(release_sources, capsys):
    root = release_sources("0.30.0")
    assert main(["status", str(root)]) == 1
    text = capsys.readouterr().out
    assert text.startswith(f"vLLM 0.30.0 in {root}\n")
    states = {line.split()[0]: line for line in text.splitlines() if line.startswith("  D")}
    assert states["D1"].endswith("mended upstream")
    assert states["D2"].endswith("present")
    assert f"to mend it: python -m tools.overlay apply {root}" in text
    Tree(root).apply()
    assert main(["status", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["release"], told["overlay"]) == ("clean", "0.30.0", "applied")
    assert told["defects"]["D2"] == "mended by the overlay"


def test_code_counts_not_the_version(release_sources):
    """A release that says it is another, and one that nobody knows yet."""
    root = release_sources("0.22.1")
    version = root / "vllm" / "_version.py"
    for name in ("0.33.0", "0.99.0"):
        version.write_text(f"__version__ = '{name}'\n")
        assert "D1" in present(root) and "D2" not in present(root)
    version.unlink()
    assert "D1" in present(root)


def test_a_defect_that_someone_else_mended(release_sources):
    root = release_sources("0.22.1")
    for name in ("qwen3_vl.py", "qwen3_omni_moe_thinker.py"):
        file = root / MODELS / name
        count = '"deepstack_input_embeds_num_tokens", 0)'
        text = file.read_text()
        assert count in text
        file.write_text(text.replace(count, '"deepstack_tokens", 1)'))
    assert status(root).defects["D1"] == "mended"


@pytest.mark.parametrize("broken", ["missing", "renamed", "syntax"])
def test_cannot_tell(release_sources, broken, capsys):
    root = release_sources("0.22.1")
    file = root / MODELS / "qwen3_vl.py"
    if broken == "missing":
        file.unlink()
    elif broken == "syntax":
        file.write_text("def\n")
    else:
        file.write_text(file.read_text().replace("def _get_deepstack_input_embeds", "def _read"))
    assert main(["status", str(root)]) == 2
    text = capsys.readouterr().out
    assert "cannot tell" in text and str(file) in text and "present" not in text


def test_interrupted(release_sources):
    root = release_sources("0.22.1")
    Tree(root).apply()
    manifest = root / STATE / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"applied"', '"applying"'))
    found = status(root)
    assert (found.code, found.overlay) == (2, "interrupted")
    Tree(root).revert()
    assert status(root).overlay == "not applied"


def test_an_older_overlay(release_sources):
    root = release_sources("0.22.1")
    Tree(root).apply()
    with (root / MODELS / "deepstack.py").open("a") as file:
        file.write("# older\n")
    assert status(root).overlay == "another version"


def test_the_installed_vllm():
    """Without a tree, that of this Python: here, the fork's wheel."""
    command = [sys.executable, "-m", "tools.overlay", "status", "--json"]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(done.stdout)["defects"].values()) <= {
        "mended by the overlay",
        "not in this release",
        "mended upstream",
    }


def test_no_vllm(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "missing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["apply", str(tmp_path), "--json"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_graphs_from_before_the_patch(release_sources, monkeypatch, tmp_path, when):
    """Said only where vLLM would take them, or would refuse to start without them."""
    root, cache_dir = release_sources("0.22.1"), tmp_path / "given"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    Tree(root).apply()
    graphs = [
        tmp_path / "torch_compile_cache/torch_aot_compile/0123/rank_0_0/model",
        cache_dir / "rank_0_0/backbone/vllm_compile_cache.py",
    ]
    for graph in graphs:
        graph.parent.mkdir(parents=True)
        graph.touch()
        shift = {"before": -60, "after": 60}[when]
        os.utime(graph, (time.time() + shift, time.time() + shift))
    assert status(root).warnings == []
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    found = status(root, cache_dir=cache_dir)
    assert found.code == 0
    if when == "after":
        assert found.warnings == []
    else:
        refused, taken = found.warnings
        assert "VLLM_FORCE_AOT_LOAD=1" in refused and str(cache_dir) in taken
        assert f"warning: {taken}" in found.text()


def test_no_patch_no_warning(release_sources, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    assert status(release_sources("0.33.0"), cache_dir=tmp_path).warnings == []
