"""Kills `apply` and `revert` before each of their writes, one after the other.

    python -m tests.overlay.faults TREE FOLDER

The tree is another user's, if this is root. Prints, for each kill, what was found:
`{"action", "write", "then", "found", "afterwards", "owners"}`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_deepstack.cli import UserError
from vllm_deepstack.patch.tree import Tree

MODELS = "vllm/model_executor/models"
KILLED = 9
OTHER_USER = 12345
WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.chmod",
    "os.chown",
    "os.setxattr",
    "os.utime",
    "vllm_deepstack.exchange",
}


def content(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def owners(root: Path) -> list[int]:
    """The users that own the folders and files of a tree."""
    return sorted({path.lstat().st_uid for path in (root, *root.rglob("*"))})


def give_away(root: Path, user: int) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)


def code(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in found.items() if path.startswith("vllm/")}


def overlays(folder: Path) -> tuple[Path, Path]:
    """Two versions of a small one: it is merged a thousand times."""
    for version in ("older", "newer"):
        models = folder / version / MODELS
        models.mkdir(parents=True)
        (models / "deepstack.py").write_text(f"VERSION = {version!r}\n")
        (models / "moss_audio.py").write_text("from .deepstack import VERSION\n")
        (models / "qwen3_vl_moe.py").write_text(f"DEEPSTACK = {version!r}\n")
        (folder / version / "vllm/extra.py").write_text(f"VERSION = {version!r}\n")
    return folder / "older", folder / "newer"


def kill_before(write: int, root: Path, action: Callable[[], Any]) -> bool:
    """Runs the action in a process that ends at that write; False if it did not get there."""
    child = os.fork()
    if not child:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            opened = event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (opened or event in WRITES) and str(root) in str(args[0]):
                if seen == write:
                    os._exit(KILLED)
                seen += 1

        sys.addaudithook(hook)
        action()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    return status == KILLED


def faults(tree: Path, folder: Path, every: int) -> Iterator[dict[str, Any]]:
    """Killed before every write, or before each so many."""
    older, newer = overlays(folder)
    root = folder / "tree"

    def fresh(*applied: Path) -> dict[str, bytes]:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tree, root)
        if os.geteuid() == 0:
            give_away(root, OTHER_USER)
        for overlay in applied:
            Tree(root, overlay).apply()
        return content(root)

    stock, old, new = fresh(), fresh(older), fresh(newer)
    states = {"stock": stock, "older": old, "newer": new}
    actions: dict[str, tuple[tuple[Path, ...], Callable[[], Any]]] = {
        "apply": ((), lambda: Tree(root, newer).apply()),
        "revert": ((newer,), lambda: Tree(root, newer).revert()),
        "apply over an older one": ((older,), lambda: Tree(root, newer).apply()),
    }
    for name, (applied, action) in actions.items():
        for then in ("apply", "revert"):
            write = 0
            while True:
                fresh(*applied)
                if not kill_before(write, root, action):
                    break
                found = [key for key, files in states.items() if code(files) == code(content(root))]
                try:
                    getattr(Tree(root, newer), then)()
                except UserError as error:
                    if then == "apply" or "not applied" not in str(error):
                        raise
                later = [key for key, files in states.items() if files == content(root)]
                yield {
                    "action": name,
                    "write": write,
                    "then": then,
                    "found": found,
                    "afterwards": later,
                    "owners": owners(root),
                }
                write += every


if __name__ == "__main__":
    for fault in faults(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])):
        print(json.dumps(fault), flush=True)
