"""The pull requests' overlays fit the release that they are written for, and are small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from tests.conftest import BUILD
from tools import package_index, releases
from tools.overlay.merge import merge
from upstream.pulls import lines, pulls

RELEASE = Version("0.33.0")
PULLS = {pull.name: pull for pull in pulls(RELEASE)}
# Lines added and removed, outside tests.
SIZES = {
    "1-clear-deepstack": (15, 13),
    "2-clear-granite": (4, 11),
    "3-moss-audio": (22, 14),
    "5-omni-prompts": (4, 21),
    "6-prompt-embeds": (6, 0),
    "7-mixin": (61, 168),
}


@pytest.fixture(scope="module")
def sources() -> Path:
    return package_index.unpack_sources(releases.known(str(RELEASE)), BUILD / "sdist")


@pytest.fixture
def merged(sources):
    """(before, after) of a pull request's files; the seventh is made after the first."""

    def run(name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        paths = {path for pull in PULLS.values() for path in pull.overlay}
        before = {p: (sources / p).read_bytes() for p in paths if (sources / p).is_file()}
        if name == "7-mixin":
            before |= PULLS["1-clear-deepstack"].changes(before, RELEASE)
        return before, PULLS[name].changes(before, RELEASE)

    return run


@pytest.mark.parametrize("name", SIZES)
def test_size(merged, name):
    assert lines(*merged(name)) == SIZES[name]
    assert set(SIZES) == set(PULLS)


@pytest.mark.parametrize("name", SIZES)
def test_merging_twice_is_merging_once(merged, name):
    _, after = merged(name)
    overlay = PULLS[name].overlay
    for path, ours in overlay.items():
        if path in releases.known(str(RELEASE)).sources:
            again = merge(ours, after[path], path=path, release=RELEASE, overlay=overlay)
            assert again == after[path]


@pytest.mark.parametrize("name", SIZES)
def test_upstreams_formatter_has_nothing_to_do(merged, sources, name, tmp_path):
    """In the version and with the settings of that release."""
    config = yaml.safe_load((sources / ".pre-commit-config.yaml").read_text())
    (pinned,) = (r["rev"] for r in config["repos"] if r["repo"].endswith("/ruff-pre-commit"))
    (tmp_path / "pyproject.toml").write_bytes((sources / "pyproject.toml").read_bytes())
    for path, text in merged(name)[1].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text)
    ruff = [sys.executable, "-m", "uv", "tool", "run", f"ruff@{pinned.removeprefix('v')}"]
    for command in (["check", "--select", "E,F"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, "."], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["1-clear-deepstack", "2-clear-granite", "3-moss-audio"])
def test_clearing_moves_from_forward_to_embed_input_ids(merged, name):
    """A replayed graph would not run it in `forward`."""
    clears = {"zero_", "_clear_deepstack_input_embeds"}
    for path, text in merged(name)[1].items():
        (named,) = (getattr(n, "name", "") for n in ast.parse(PULLS[name].overlay[path]).body)
        (cls,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == named)
        methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
        calls = {
            method: {n.attr for n in ast.walk(methods[method]) if isinstance(n, ast.Attribute)}
            for method in ("embed_input_ids", "forward")
        }
        assert calls["embed_input_ids"] & clears and not calls["forward"] & clears, path
