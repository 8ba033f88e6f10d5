"""Kills `apply` and `revert` before each of their writes, one after the other.

    python -m tests.overlay.faults TREE FOLDER EVERY [overlay]

The tree is another user's, if this is root. With `overlay`, it is in the lower layer of an overlay
file system, as in a Docker build, where no folder of it can be renamed. Prints, for each kill,
what was found:
`{"action", "write", "then", "broken", "merged", "afterwards", "owners"}`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_deepstack import releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.merged import NONE, table
from vllm_deepstack.patch import record
from vllm_deepstack.patch.transaction import RECORD, Files
from vllm_deepstack.patch.tree import MIXIN, OVERLAY, Tree, overlay_files

MODELS = "vllm/model_executor/models"
KILLED = 9
OTHER_USER = 12345
WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.setxattr",
    "os.utime",
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


def give_as(like: Path, root: Path) -> None:
    for path in (like, *like.rglob("*")):
        now = path.lstat()
        os.chown(root / path.relative_to(like), now.st_uid, now.st_gid, follow_symlinks=False)


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


def make_fast() -> None:
    """Merging takes a second, and there are a thousand calls: from here on, it is looked up. And a
    kill loses nothing that is not on the disk yet."""
    os.fsync = lambda _: None  # type: ignore[assignment]
    merge, made = Tree._after, dict[str, dict[str, bytes]]()

    def look_up(self: Tree, upstream: Files) -> dict[str, bytes]:
        key = self.overlay[MIXIN].decode()
        if key not in made:
            made[key] = merge(self, upstream)
        return made[key]

    Tree._after = look_up  # type: ignore[method-assign]


def broken(root: Path, states: dict[str, dict[str, bytes]]) -> list[str]:
    """What is wrong with a tree in which `apply` or `revert` was killed."""
    found, stock = content(root), states["stock"]
    now = {path: data for path, data in code(found).items() if data != stock.get(path)}
    wrong = [f"{path} is missing" for path in code(stock).keys() - found.keys()]
    versions = set()
    for path, data in now.items():
        made = [name for name, files in states.items() if files.get(path) == data]
        if not made:
            wrong.append(f"{path} is of no version")
        if len(made) == 1:
            versions |= {*made}
        before = releases.sha256(stock[path]) if path in stock else NONE
        needs = table().files[path][before].needs
        wrong += [f"{path} is there before {need}" for need in needs if need not in now]
    if len(versions) > 1:
        wrong.append(f"files of {sorted(versions)}")
    listed = record.paths(next(data for path, data in found.items() if RECORD.fullmatch(path)))
    return wrong + [f"RECORD has no {path}" for path in code(found).keys() - listed]


class Place:
    """Where a tree is put before each kill: copied there, or as the lower layer of a mount."""

    def __init__(self, folder: Path, layered: bool):
        self.root, self.layered, self.layers = folder / "tree", layered, folder / "layers"

    def fresh(self, state: Path) -> Path:
        self.clear()
        if not self.layered:
            shutil.copytree(state, self.root)
            give_as(state, self.root)
            return self.root
        for name in (self.layers / "upper", self.layers / "work", self.root):
            name.mkdir(parents=True)
        os.chown(self.layers / "upper", state.stat().st_uid, state.stat().st_gid)  # of its root
        layers = f"upperdir={self.layers}/upper,workdir={self.layers}/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={state},{layers}"]
        subprocess.run([*command, str(self.root)], check=True)
        return self.root

    def kept(self, where: Path) -> Path:
        """A copy of the tree as it is."""
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(self.root, where)
        give_as(self.root, where)
        return where

    def clear(self) -> None:
        if self.layered and self.root.is_mount():
            subprocess.run(["umount", str(self.root)], check=True)
        for left in (self.root, self.layers):
            shutil.rmtree(left, ignore_errors=True)


def faults(tree: Path, folder: Path, every: int, layered: bool) -> Iterator[dict[str, Any]]:
    """Killed before every write, or before each so many."""
    newer = overlay_files(OVERLAY)
    older = {path: data + b"\nOLDER = True\n" for path, data in newer.items()}
    place = Place(folder, layered)
    make_fast()
    stock = Path(shutil.copytree(tree, folder / "stock"))
    if os.geteuid() == 0:
        give_away(stock, OTHER_USER)
    prepared, states, root = {"stock": stock}, {"stock": content(stock)}, place.root
    for name, overlay in {"older": older, "newer": newer}.items():
        Tree(place.fresh(stock), overlay).apply()
        states[name], prepared[name] = content(root), place.kept(folder / name)
    changed = {p for p, data in code(states["newer"]).items() if data != states["stock"].get(p)}
    actions: dict[str, tuple[str, Callable[[], Any]]] = {
        "apply": ("stock", lambda: Tree(root, newer).apply()),
        "revert": ("newer", lambda: Tree(root, newer).revert()),
        "apply over an older one": ("older", lambda: Tree(root, newer).apply()),
    }
    for name, (before, action) in actions.items():
        write = 0
        while True:
            place.fresh(prepared[before])
            if not kill_before(write, root, action):
                break
            wrong, found = broken(root, states), content(root)
            killed = place.kept(folder / "killed")
            merged = sum(found.get(path) == states["newer"][path] for path in changed)
            for then in ("apply", "revert"):
                try:
                    getattr(Tree(place.fresh(killed), newer), then)()
                except UserError as error:
                    if then == "apply" or "not applied" not in str(error):
                        raise
                yield {
                    "action": name,
                    "write": write,
                    "then": then,
                    "broken": wrong,
                    "merged": f"{merged} of {len(changed)}",
                    "afterwards": [key for key, files in states.items() if files == content(root)],
                    "owners": owners(root),
                }
            write += every
    place.clear()


if __name__ == "__main__":
    tree, folder, every, *layered = sys.argv[1:]
    for fault in faults(Path(tree), Path(folder), int(every), bool(layered)):
        print(json.dumps(fault), flush=True)
