"""`vllm-deepstack` as root, on trees that others can write to: nothing outside is touched, and what
it replaces stays its owner's."""

from __future__ import annotations

import errno
import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import examples
from vllm_deepstack import STATE, releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.patch.tree import Tree

from .faults import MODELS, OTHER_USER, content, give_away, overlays, owners

QWEN3_VL = f"{MODELS}/qwen3_vl.py"
VERBS = ("status", "diff", "apply", "revert")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def sources(release_sources) -> Path:
    return release_sources("0.22.1")


EVIL = (
    "../victim.txt",
    "vllm/../../victim.txt",
    "/victim.txt",
    "victim/../../victim.txt",
    "vllm/model_executor/models/../../../../victim.txt",
    "vllm/model_executor/models/llama.py",
    ".vllm-deepstack/originals",
    "vllm-0.22.1.dist-info/../../RECORD",
    "torch-2.11.0.dist-info/RECORD",
    "vllm/__init__.py",
    "",
    ".",
    "\0",
    "\ud800",
)
DIGEST = "0" * 64
keys = st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
OURS = (QWEN3_VL, f"{MODELS}/deepstack.py")
a_path = st.sampled_from([*EVIL, *OURS]) | st.text(max_size=20)
files = st.dictionaries(a_path, st.sampled_from([DIGEST, None, "x"]) | anything, max_size=4)
manifests = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["applied", "applying", "reverting"]) | anything,
        "release": st.just("0.22.1") | anything,
        "files": files | anything,
    },
)
texts = st.one_of(
    manifests.map(json.dumps),
    anything.map(json.dumps),
    st.text(max_size=30),
    st.just("[" * 100_000),
).map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=30)


@pytest.fixture(scope="module")
def small(tmp_path_factory, release_sources_once):
    """A patched tree, a copy to put back, an overlay that merges fast, and a victim beside."""
    folder = tmp_path_factory.mktemp("trust")
    tree, kept, victim = folder / "tree", folder / "kept", folder / "victim.txt"
    _, overlay = overlays(folder)
    shutil.copytree(release_sources_once, tree)
    Tree(tree, overlay).apply()
    shutil.copytree(tree, kept)
    victim.write_text("precious")
    return tree, kept, overlay, victim


@pytest.fixture(scope="module")
def release_sources_once(release_sources) -> Path:
    return release_sources("0.22.1")


def crafted(path: str) -> bytes:
    files = {QWEN3_VL: DIGEST, path: DIGEST}
    return json.dumps({"status": "applied", "release": "0.22.1", "files": files}).encode()


@pytest.mark.thinned
@given(text=texts)
@example(text=b"")
@example(text=b"{}")
@example(text=crafted("../victim.txt"))
@example(text=crafted("\ud800"))
@settings(
    max_examples=examples(500),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_malformed_manifests(small, capsys, text):
    """Refused whole, with a message: no traceback, and not a file changed."""
    tree, kept, overlay, victim = small
    manifest = tree / STATE / "manifest.json"
    manifest.write_bytes(text)
    before = content(tree)
    for verb in VERBS:
        merged = [] if verb == "status" else ["--overlay", str(overlay)]
        code = main([verb, str(tree), *merged])
        told = capsys.readouterr()
        assert victim.read_text() == "precious"
        assert sorted(path.name for path in tree.parent.iterdir()) == [
            "kept",
            "newer",
            "older",
            "tree",
            "victim.txt",
        ]
        if not well_formed(text):
            assert code and content(tree) == before
            assert "error: " in told.err or "cannot tell: " in told.out
    shutil.rmtree(tree)
    shutil.copytree(kept, tree)


def well_formed(text: bytes) -> bool:
    """Hardly ever: a manifest that says nothing wrong, though nobody wrote it."""
    try:
        manifest = json.loads(text)
        return (
            manifest["status"] in ("applied", "applying", "reverting")
            and isinstance(manifest["release"], str)
            and len(manifest["files"]) > 0
            and all(path in OURS for path in manifest["files"])
            and all(digest in (None, DIGEST) for digest in manifest["files"].values())
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


@pytest.mark.parametrize("path", EVIL)
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_paths_that_are_not_ours(sources, path, verb, capsys):
    victim = sources.parent / "victim.txt"
    victim.write_text("precious")
    Tree(sources).apply()
    manifest = sources / STATE / "manifest.json"
    told = json.loads(manifest.read_text())
    digest = hashlib.sha256(b"precious").hexdigest()
    manifest.write_text(json.dumps(told | {"files": {**told["files"], path: digest}}))
    before = content(sources)
    assert main([verb, str(sources)]) == 1
    assert "is not a file that vllm-deepstack changes" in capsys.readouterr().err
    assert content(sources) == before and victim.read_text() == "precious"


@pytest.mark.parametrize("how", ["missing", "another's"])
def test_originals_that_are_not_the_release_s(sources, how, capsys):
    Tree(sources).apply()
    original = sources / STATE / "originals" / QWEN3_VL
    original.unlink() if how == "missing" else original.write_text("import evil\n")
    before = content(sources)
    assert main(["revert", str(sources)]) == 1
    assert "missing, or not as it was put aside" in capsys.readouterr().err
    assert content(sources) == before


LINKS = {
    "vllm": "vllm",
    "a folder": MODELS,
    "a file": QWEN3_VL,
    "where the mixin goes": f"{MODELS}/deepstack.py",
    "our folder": STATE,
    "our originals": f"{STATE}/originals",
    "an original": f"{STATE}/originals/{QWEN3_VL}",
    "the manifest": f"{STATE}/manifest.json",
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_links_are_not_followed(sources, tmp_path, name, verb, capsys):
    """uv's `--link-mode symlink`, a folder of one's own linked into site-packages, or an attack."""
    link = sources / LINKS[name]
    if STATE in str(link) or verb == "revert":
        Tree(sources).apply()
    elsewhere = tmp_path / "elsewhere"
    if link.exists():
        shutil.move(link, elsewhere)
    else:
        shutil.copy(releases.ROOT / MODELS / "deepstack.py", elsewhere)
    link.symlink_to(elsewhere)
    before, outside = content(sources), content(tmp_path)
    assert main([verb, str(sources)]) == 1
    assert f"{link}: is a symbolic link to {elsewhere}" in capsys.readouterr().err
    assert (content(sources), content(tmp_path)) == (before, outside)
    assert main(["status", str(sources)]) in (0, 1, 2)  # it reads, and changes nothing


def test_a_link_in_place_of_compiled_files(sources, tmp_path):
    """They are deleted for what is replaced, and not elsewhere."""
    (tmp_path / "qwen3_vl.important.pyc").write_text("precious")
    (sources / MODELS / "__pycache__").symlink_to(tmp_path)
    Tree(sources).apply()
    assert (tmp_path / "qwen3_vl.important.pyc").read_text() == "precious"


@as_root
def test_root_works_as_the_owner_of_a_tree(release_sources, monkeypatch, capsys):
    """Whatever they put in the way while it works, it can do no more than they."""
    users = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = Path(shutil.copytree(release_sources("0.22.1"), f"{folder}/tree"))
        give_away(root, OTHER_USER)
        plan = Tree.plan

        def watched(self):
            users.append((os.geteuid(), os.getegid(), os.getgroups()))
            return plan(self)

        monkeypatch.setattr(Tree, "plan", watched)
        before = attributes(root)
        assert main(["apply", str(root)]) == 0, capsys.readouterr().err
        assert owners(root) == [OTHER_USER]
        assert main(["revert", str(root)]) == 0
        assert attributes(root) == before
        (root / QWEN3_VL).unlink()
        (root / QWEN3_VL).symlink_to("/etc/shadow")
        assert main(["diff", str(root)]) == 1
        assert "Permission denied" in capsys.readouterr().err
    assert users == [(OTHER_USER, OTHER_USER, [])] * len(users)
    assert os.geteuid() == 0


def kept_attributes(root: Path) -> None:
    """A mode and an attribute that are not the usual ones, on a file that is merged."""
    (root / QWEN3_VL).chmod(0o640)
    try:
        os.setxattr(root / QWEN3_VL, "user.label", b"secret")
    except OSError as error:
        assert error.errno == errno.ENOTSUP


def attributes(root: Path) -> dict[str, Any]:
    def labels(path: Path) -> dict[str, bytes]:
        return {name: os.getxattr(path, name) for name in os.listxattr(path)}

    found = {path: path.lstat() for path in (root, *root.rglob("*"))}
    return {
        path.relative_to(root).as_posix(): (s.st_uid, s.st_gid, s.st_mode, labels(path))
        for path, s in found.items()
    }


@as_root
def test_what_is_replaced_stays_its_owner_s(sources):
    """Owner, group, mode, and the attributes in which security modules keep their labels."""
    give_away(sources, OTHER_USER)
    kept_attributes(sources)
    (sources / MODELS).chmod(0o2755)
    before = attributes(sources)
    Tree(sources).apply()
    after = attributes(sources)
    assert owners(sources) == [OTHER_USER]
    assert {path: after[path] for path in before} == before
    assert stat.S_IMODE(after[f"{MODELS}/deepstack.py"][2]) == 0o644
    Tree(sources).revert()
    assert attributes(sources) == before


SHARED = {
    "another owner": (OTHER_USER, 0, 0o755),
    "all": (0, 0, 0o777),
    "all, and a sticky bit": (0, 0, 0o1777),
    "a group without a name": (0, OTHER_USER, 0o2775),
}


@as_root
@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("name", ["vllm", MODELS, STATE])
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_root_does_not_write_where_others_can(sources, name, how, verb, capsys):
    """They could put a link there after links were looked for."""
    if STATE in name or verb == "revert":
        Tree(sources).apply()
    uid, gid, mode = SHARED[how]
    os.chown(sources / name, uid, gid)
    (sources / name).chmod(mode)
    before = content(sources)
    assert main([verb, str(sources)]) == 1
    message = capsys.readouterr().err
    assert f"{sources / name}: its owner is {SHARED[how][0]}:{SHARED[how][1]}, its mode" in message
    assert "chmod -R go-w" in message
    assert content(sources) == before


@as_root
@pytest.mark.parametrize("group, code", [("empty", 0), ("root", 0), ("own", 1), ("joined", 1)])
def test_groups_that_others_are_in(sources, monkeypatch, group, code):
    """Debian has an empty group for /usr/local; and umask 002 is common."""
    named = {"empty": [], "root": [], "own": [], "joined": ["ada"]}
    number = 0 if group == "root" else 50
    primary = number if group == "own" else 1000
    ada = pwd.struct_passwd(("ada", "x", 1000, primary, "", "/", "/"))
    root = pwd.struct_passwd(("root", "x", 0, 0, "", "/", "/"))
    known = grp.struct_group((group, "x", number, named[group]))
    monkeypatch.setattr("pwd.getpwall", lambda: [root, ada])
    monkeypatch.setattr("grp.getgrgid", lambda _: known)
    for folder in (sources, *(path for path in sources.rglob("*") if path.is_dir())):
        os.chown(folder, 0, number)
        folder.chmod(0o2775)
    assert main(["apply", str(sources)]) == code


@as_root
def test_a_file_of_another_user_in_a_tree_of_one_s_own(sources):
    """Without the right to give it back, it is not replaced, and nothing is."""
    (sources / QWEN3_VL).chmod(0o644)
    os.chown(sources / QWEN3_VL, OTHER_USER, OTHER_USER)
    before, owned = content(sources), attributes(sources)
    drop = ["setpriv", "--bounding-set=-chown", "--inh-caps=-chown"]
    command = [*drop, sys.executable, "-m", "vllm_deepstack", "apply", str(sources)]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr and "nothing was changed" in done.stderr
    assert (content(sources), attributes(sources)) == (before, owned)


@pytest.mark.parametrize("mounted", ["vllm", MODELS])
def test_a_part_on_another_file_system(sources, tmp_path, mounted):
    """Files cannot be renamed from one to another: right, or refused with nothing changed."""
    script = f"""
set -e
cp -a {sources}/{mounted} {tmp_path}/copy
mount -t tmpfs none {sources}/{mounted}
cp -a {tmp_path}/copy/. {sources}/{mounted}
set +e
{sys.executable} -m vllm_deepstack apply {sources}
echo "exit code $?"
diff -r {tmp_path}/copy {sources}/{mounted} && echo unchanged
"""
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", script],
        cwd=releases.ROOT,
        capture_output=True,
        text=True,
    )
    if "unshare failed" in done.stderr or "mount failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.splitlines()[0]}")
    assert "exit code 1" in done.stdout and "unchanged" in done.stdout, done.stdout + done.stderr
    assert "a part of it is another file system" in done.stderr
    assert "nothing was changed" in done.stderr


def test_a_zip_file(sources, tmp_path, capsys):
    archive = tmp_path / "vllm.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(sources / "vllm/__init__.py", "vllm/__init__.py")
    assert main(["apply", str(archive)]) == 1
    assert "vllm.zip: is a file; name a folder that contains vllm/" in capsys.readouterr().err
