"""The verbs, on the sources of real releases."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_deepstack import releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.cli import UserError
from vllm_deepstack.patch import tree
from vllm_deepstack.patch.tree import Tree

MODELS = "vllm/model_executor/models"
QWEN3_VL = f"{MODELS}/qwen3_vl.py"
FULLY = ["0.20.0", "0.21.0", "0.22.1", "0.23.0", "0.27.1", "0.33.0"]
# The other releases, but for those whose files are the same as another's.
DISTINCT = {str(r.sources): str(version) for version, r in releases.releases().items()}
DISTINCT |= {str(releases.known(version).sources): version for version in FULLY}
OTHERS = sorted(set(DISTINCT.values()) - set(FULLY))


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git/" not in path.as_posix()
    }


@pytest.fixture
def sources(release_sources) -> Path:
    return release_sources("0.22.1")


@pytest.mark.parametrize("version", FULLY)
def test_diff_apply_and_revert(release_sources, version, capsys):
    root = release_sources(version)
    before = content(root)

    assert main(["diff", str(root)]) == 0
    patch = capsys.readouterr().out
    assert content(root) == before
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    subprocess.run(["git", "apply", "--check"], cwd=root, input=patch, text=True, check=True)
    subprocess.run(["git", "apply"], cwd=root, input=patch, text=True, check=True)
    patched = content(root)
    subprocess.run(["git", "apply", "--reverse"], cwd=root, input=patch, text=True, check=True)
    assert content(root) == before

    assert main(["apply", str(root)]) == 0
    after = content(root)
    assert {path: data for path, data in after.items() if path.startswith("vllm/")} == patched
    assert set(patched) - set(before) == {f"{MODELS}/deepstack.py"}
    for path, data in patched.items():
        compile(data, path, "exec")

    assert main(["apply", str(root)]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert content(root) == after
    assert main(["diff", str(root)]) == 0
    assert capsys.readouterr().out == ""

    assert main(["revert", str(root)]) == 0
    assert content(root) == before


@pytest.mark.parametrize("version", ["0.22.1", "0.33.0"])
def test_with_libcst_it_is_the_same(release_sources, monkeypatch, version):
    root = release_sources(version)
    at_hand = Tree(root)
    monkeypatch.setattr(tree, "ours_is_built", lambda: False)
    merged = Tree(root)
    assert (at_hand.built, merged.built) == (True, False)
    assert at_hand.changes() == merged.changes()


@pytest.mark.parametrize("version", OTHERS)
def test_merge_of_every_other_release(release_sources, version):
    root = release_sources(version)
    for change in Tree(root).changes():
        compile(change.after, change.path, "exec")
        (root / change.path).write_bytes(change.after)
    assert Tree(root).changes() == []


def test_checkout_without_a_version_is_known_by_its_files(sources):
    (sources / "vllm/_version.py").unlink()
    assert Tree(sources).release.sources == releases.known("0.22.1").sources


def fails(root: Path, *words: str, verb: str = "apply", capsys: pytest.CaptureFixture[str]) -> None:
    before = content(root)
    assert main([verb, str(root)]) == 1
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert content(root) == before


def test_files_of_no_release(sources, capsys):
    """Are merged, as of the release that the tree has most files of, and said to be untested."""
    (sources / "vllm/_version.py").write_text("version: str\n")
    with (sources / QWEN3_VL).open("a") as file:
        file.write("# mine\n")
    before = content(sources)
    told = (
        f"warning: {sources / QWEN3_VL}: from no release: merged as of vLLM 0.22.1, and not tested"
    )
    assert main(["diff", str(sources)]) == 0
    assert told in capsys.readouterr().err
    assert main(["apply", str(sources)]) == 0
    assert told in capsys.readouterr().err
    merged = (sources / QWEN3_VL).read_text()
    assert merged.endswith("# mine\n") and "DeepStackMixin" in merged
    assert main(["apply", str(sources)]) == 0
    assert main(["revert", str(sources)]) == 0
    assert content(sources) == before
    assert main(["diff", str(sources), "--as", "0.33.0"]) == 1  # does not fit


def test_as_another_release_and_back(sources, capsys):
    """What was named when it was applied need not be named again."""
    for path in releases.known("0.22.1").sources:
        file = sources / path
        file.write_bytes(file.read_bytes() + b"# mine\n")
    before = content(sources)
    assert main(["apply", str(sources), "--as", "0.22.1"]) == 0
    assert main(["apply", str(sources)]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert main(["revert", str(sources)]) == 0
    assert content(sources) == before


class TestErrors:
    """Each names what is wrong, and leaves the tree as it was."""

    def test_no_vllm(self, tmp_path, capsys):
        fails(tmp_path, str(tmp_path), "no vLLM there", capsys=capsys)

    @pytest.mark.parametrize("verb", ["diff", "apply"])
    def test_no_file_of_a_release(self, sources, verb, capsys):
        for path in releases.known("0.22.1").sources:
            (sources / path).write_text("x = 1\n")
        fails(sources, "--as RELEASE", verb=verb, capsys=capsys)

    def test_a_file_that_the_overlay_does_not_fit(self, sources, capsys):
        (sources / QWEN3_VL).write_text("x = 1\n")
        fails(sources, "qwen3_vl.py: ", "0.22.1", capsys=capsys)

    def test_a_release_that_is_not_known(self, sources, capsys):
        assert main(["apply", str(sources), "--as", "0.19.1"]) == 1
        assert "unknown vLLM release 0.19.1; known are: 0.20.0" in capsys.readouterr().err

    def test_someone_elses_deepstack_module(self, sources, capsys):
        (sources / MODELS / "deepstack.py").write_text("x = 1\n")
        fails(sources, "deepstack.py", "edited", capsys=capsys)

    def test_missing_model_file(self, sources, capsys):
        (sources / QWEN3_VL).unlink()
        fails(sources, QWEN3_VL, "missing", capsys=capsys)

    def test_overlay_that_does_not_fit(self, sources, tmp_path):
        shutil.copytree(releases.ROOT / "vllm", tmp_path / "vllm")
        (tmp_path / QWEN3_VL).write_text("class Qwen4VLForConditionalGeneration(Base): ...\n")
        before = content(sources)
        with pytest.raises(
            UserError, match=r"qwen3_vl.py: Qwen4VLForConditionalGeneration.*0\.22\.1"
        ):
            Tree(sources, tmp_path).apply()
        assert content(sources) == before

    def test_no_overlay(self, sources, tmp_path):
        with pytest.raises(UserError, match="no overlay there"):
            Tree(sources, tmp_path)

    def test_revert_of_what_was_not_applied(self, sources, capsys):
        fails(sources, "not applied", verb="revert", capsys=capsys)

    @pytest.mark.parametrize("verb", ["apply", "revert"])
    def test_edit_after_apply(self, sources, verb, capsys):
        assert main(["apply", str(sources)]) == 0
        with (sources / QWEN3_VL).open("a") as file:
            file.write("# mine\n")
        fails(sources, QWEN3_VL, "edited", verb=verb, capsys=capsys)

    def test_read_only_tree(self, sources):
        """Run without the right that root has over read-only files."""
        folders = [sources, *(path for path in sources.rglob("*") if path.is_dir())]
        before = content(sources)
        for folder in folders:
            folder.chmod(0o555)
        drop = (
            ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
            if os.geteuid() == 0
            else []
        )
        command = [*drop, sys.executable, "-m", "vllm_deepstack", "apply", str(sources)]
        done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
        for folder in folders:
            folder.chmod(0o755)
        assert done.returncode == 1
        assert "cannot be written to" in done.stderr and "nothing was changed" in done.stderr
        assert content(sources) == before


def test_new_overlay_over_an_older_one(sources, tmp_path):
    before = content(sources)
    shutil.copytree(releases.ROOT / "vllm", tmp_path / "vllm")
    Tree(sources).apply()
    with (tmp_path / MODELS / "deepstack.py").open("a") as file:
        file.write("# newer\n")
    assert [change.path for change in Tree(sources, tmp_path).changes()] == [
        f"{MODELS}/deepstack.py"
    ]
    Tree(sources, tmp_path).apply()
    assert (sources / MODELS / "deepstack.py").read_text().endswith("# newer\n")
    Tree(sources, tmp_path).revert()
    assert content(sources) == before


def test_links_to_other_installations_are_not_written_through(sources, tmp_path):
    """uv links an installation's files to its cache."""
    (tmp_path / "cached.py").hardlink_to(sources / QWEN3_VL)
    before = (tmp_path / "cached.py").read_bytes()
    Tree(sources).apply()
    assert (tmp_path / "cached.py").read_bytes() == before != (sources / QWEN3_VL).read_bytes()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_record_stays_true(sources, end):
    info = sources / "vllm-0.22.1.dist-info"
    info.mkdir()
    rows = [f"{path},sha256=x,1" for path in releases.known("0.22.1").sources] + [
        '"vllm/a,b.py",,',
        "vllm-0.22.1.dist-info/RECORD,,",
    ]
    (info / "RECORD").write_bytes("".join(row + end for row in rows).encode())
    before = content(sources)
    changed = [change.path for change in Tree(sources).apply()]
    written = (info / "RECORD").read_bytes().decode()
    assert '"vllm/a,b.py",,' + end in written and written.count("\n") == written.count(end)
    recorded = {row.split(",")[0]: row.split(",") for row in written.splitlines()}
    assert f"{MODELS}/deepstack.py" in changed
    for path in changed:
        data = (sources / path).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert recorded[path][1:] == [f"sha256={digest}", str(len(data))]
    state = {path for path in content(sources) if path.startswith(tree.STATE)}
    assert state == {path for path in recorded if path.startswith(tree.STATE)}
    Tree(sources).revert()
    assert content(sources) == before
