"""The tests that are said to bite fail where they should: on vLLM as released, and with
vllm-project/vllm#43617 alone. A test that cannot fail shows nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PR43617
from tools import releases
from tools.overlay.tree import Tree

HERE = Path(__file__).resolve()


def run_tests(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs this folder's tests with the vLLM in `tree`, other than this one."""
    command = [sys.executable, "-m", "pytest", "-q", "-rX", "-p", "no:cacheprovider", *options]
    files = [file for file in sorted(HERE.parent.glob("test_*.py")) if file != HERE]
    return subprocess.run(
        [*command, "-m", "not gpu", *map(str, files)],
        cwd=releases.ROOT,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )


def patched(tree: Path, folder: Path, *overlay: Path) -> Path:
    copy = shutil.copytree(tree, folder / "patched", copy_function=os.link)
    Tree(copy, *overlay).apply()
    return copy


@pytest.mark.parametrize("variant, fail", [("stock", 43), ("pr43617", 38), ("0.20.1", 2)])
def test_broken_variants_break_the_contract(variant, fail, stock_tree, unpacked, tmp_path):
    """Strictly: a test that passes there is a failure."""
    tree = unpacked(variant) if variant == "0.20.1" else stock_tree
    if variant == "pr43617":
        tree = patched(tree, tmp_path, PR43617)
    done = run_tests(tree, "--bites", variant, "--hypothesis-profile=unshrunk")
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" xfailed")[0].split()[-1]) >= fail


def test_contract_holds_on_the_first_release_too(unpacked, tmp_path):
    """D10, which later releases do not have, with all else."""
    later = "test_omni_vision_encoder_has_sequence_lengths_on_its_own_device"  # D8: from 0.22.0
    done = run_tests(patched(unpacked("0.20.1"), tmp_path), "-k", f"not {later}")
    assert done.returncode == 0, done.stdout
