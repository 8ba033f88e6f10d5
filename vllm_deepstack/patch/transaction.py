"""Files of a tree put in place all or none, whatever stops it: killed, no space, two at once.

What a transaction needs lies in `.vllm-deepstack`, which comes by a rename: the originals, and a
manifest that says how far it is. It goes bit by bit, the manifest last: in a Docker build, a folder
of an earlier layer cannot be renamed. Each file is replaced atomically, one after the
other: a kill leaves the first few of them, for the next call to finish or take back. So they have
to come in an order in which the first few work without the others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import STATE
from ..cli import UserError

RECORD = re.compile(r"vllm[\w.+-]*\.dist-info/RECORD")
SHA256 = re.compile(r"[0-9a-f]{64}")
OVER = "reverted"
"""The status of what is left of a revert that was killed when all was put back."""
Files = dict[str, bytes | None]
"""Contents by path in the tree; None for no file."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One at a time.

    Raises:
        UserError: another is at work.
    """
    import fcntl  # here: `status` reads manifests on Windows, too

    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"{root}: another apply or revert is at work here; try again when it is done"
        ) from None
    finally:
        os.close(handle)


class Transaction:
    """What was put in place of what, in a tree.

    `known` are the paths that it may change, beside the installation's RECORD. A manifest may have
    been written by anybody who can write to the tree, and this may run as root.
    """

    def __init__(self, root: Path, digest: Callable[[bytes | None], str | None], known: Set[str]):
        self.root, self.folder, self.digest, self.known = root, root / STATE, digest, known

    def manifest(self) -> dict | None:
        """What was noted of a change; None if nothing was, or if it is over.

        Raises:
            UserError: it is not as `begin` and `mark` write it.
        """
        data = self.read(f"{STATE}/manifest.json")
        if data is None and not (self.folder.is_dir() and os.listdir(self.folder)):
            return None
        try:
            manifest = json.loads(data or b"")
            self.check(manifest)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.folder / 'manifest.json'}: not as vllm-deepstack wrote it: {error}; "
                f"delete {self.folder}, and install vLLM again"
            ) from None
        return None if manifest["status"] == OVER else manifest

    def check(self, manifest: Any) -> None:
        """Raises ValueError."""
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        if manifest.get("status") not in ["applying", "applied", "reverting", OVER]:  # of any type
            raise ValueError(f"its status is {manifest.get('status')!r}")
        if not isinstance(manifest.get("release"), str):
            raise ValueError("it names no release")
        files = manifest.get("files")
        if not isinstance(files, dict) or not files:
            raise ValueError("it names no files")
        for path, digest in files.items():
            if path not in self.known and not RECORD.fullmatch(path):
                raise ValueError(f"{path!r} is not a file that vllm-deepstack changes")
            if digest is not None and not (isinstance(digest, str) and SHA256.fullmatch(digest)):
                raise ValueError(f"{path!r} has no sha256")

    def original(self, path: str) -> bytes | None:
        return self.read(f"{STATE}/originals/{path}")

    def begin(self, originals: Files, after: Files, **facts: Any) -> None:
        """Notes what is put in place of what."""
        digests = [{p: self.digest(data) for p, data in of.items()} for of in (after, originals)]
        manifest = {**facts, "status": "applying", **dict(zip(("files", "originals"), digests))}
        made = Path(tempfile.mkdtemp(prefix=f"{STATE}.", dir=self.root))
        try:
            save(made / ".gitignore", b"*\n")
            save(made / "manifest.json", json.dumps(manifest, indent=2).encode())
            for path, data in originals.items():
                if data is not None:
                    file = made / "originals" / path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save(file, data)
            for one in (made, *made.rglob("*")):  # whoever can read the tree, whatever the umask
                one.chmod(0o755 if one.is_dir() else 0o644)
                own(one, self.root.stat())
            made.rename(self.folder)
        except BaseException:
            shutil.rmtree(made)
            raise

    def mark(self, status: str) -> None:
        manifest = (self.manifest() or {}) | {"status": status}
        replace(self.folder / "manifest.json", json.dumps(manifest, indent=2).encode(), self.root)

    def put(self, files: Files) -> None:
        """In the order of `files`."""
        for path, data in files.items():
            place(self.root / path, data, self.root)

    def take_back(self) -> list[str]:
        """Puts back what was there, in the reverse order. Returns the files' paths.

        Raises:
            UserError: a file is neither the original nor what was put there; or as `guard`.
        """
        manifest = self.manifest()
        assert manifest
        before = {path: self.original(path) for path in manifest["files"]}
        for path, data in before.items():
            if self.digest(data) != manifest.get("originals", {}).get(path, self.digest(data)):
                raise UserError(
                    f"{self.folder / 'originals' / path}: missing, or not as it was put aside; "
                    f"delete {self.folder}, and install vLLM again"
                )
        left: Files = {}
        for path, after in reversed(manifest["files"].items()):
            now = self.now(path)
            if now == self.digest(before[path]):
                continue
            if now != after:
                raise UserError(
                    f"{self.root / path}: edited since the overlay was applied; "
                    "undo that edit first"
                )
            left[path] = before[path]
        self.guard(left)
        self.mark("reverting")
        self.put(left)
        self.end()
        return [*before]

    def read(self, path: str) -> bytes | None:
        """A file's content; None if there is none.

        Raises:
            UserError: it is no file; or it is one of what is kept to put back, and a link.
        """
        file = self.root / path
        if path.startswith(STATE):
            self.refuse_links([path])
        if file.is_file():
            return file.read_bytes()
        if file.exists():
            raise UserError(f"{file}: is not a file")
        return None

    def refuse_links(self, paths: Iterable[str]) -> None:
        """Before something is written.

        Raises:
            UserError: one of the paths is, or leads through, a link: what is written would reach
                what lies elsewhere.
        """
        for path in paths:
            file = self.root
            for part in Path(path).parts:
                file = file / part
                if file.is_symlink():
                    raise UserError(
                        f"{file}: is a symbolic link to {os.readlink(file)}, which is left alone: "
                        "use the plugin, or name the folder that has the files, or install vLLM "
                        "with copies of them (uv: --link-mode copy)"
                    )

    def guard(self, paths: Iterable[str]) -> None:
        """Before something is written: raises as `refuse_links` and `refuse_writers`."""
        paths = [*paths, f"{STATE}/manifest.json"]
        self.refuse_links(paths)
        if os.geteuid() == 0:
            from .writers import refuse_writers

            refuse_writers(self.root, paths)

    def now(self, path: str) -> str | None:
        return self.digest(self.read(path))

    def end(self) -> None:
        """Removes the folder, and from its manifest's last words on it is not there."""
        self.mark(OVER)
        self.clear()

    def clear(self) -> None:
        last = self.folder / "manifest.json"
        for left in sorted({*self.folder.iterdir()} - {last}):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        last.unlink(missing_ok=True)
        self.folder.rmdir()

    def recover(self) -> list[str]:
        """After a kill: finishes what was all in place, and takes back the rest.

        Returns the paths of the files that it took back.
        """
        self.guard([])
        for left in self.root.glob(f"{STATE}.*"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        manifest = self.manifest()
        if manifest is None and self.folder.is_dir():
            self.clear()
        if manifest is None or manifest["status"] == "applied":
            return []
        in_place = all(self.now(path) == after for path, after in manifest["files"].items())
        if manifest["status"] == "applying" and in_place:
            self.mark("applied")
            return []
        return self.take_back()


def own(path: Path, like: os.stat_result) -> None:
    """Gives a file or folder the owner and the group of another."""
    now = path.stat()
    if (now.st_uid, now.st_gid) != (like.st_uid, like.st_gid):
        os.chown(path, like.st_uid, like.st_gid)
        path.chmod(stat.S_IMODE(now.st_mode))  # chown takes bits away


def place(file: Path, data: bytes | None, scratch: Path) -> None:
    """A file's content, or no file; and none of what Python compiled of another. That goes first:
    the file says to a later call that it is done."""
    cache = file.parent / "__pycache__"
    for cached in () if cache.is_symlink() else cache.glob(f"{file.stem}.*.pyc"):
        cached.unlink(missing_ok=True)
    if data is None:
        file.unlink(missing_ok=True)
    else:
        replace(file, data, scratch)


def save(file: Path | int, data: bytes) -> None:
    """Through to the disk."""
    with open(file, "wb") as output:
        output.write(data)
        output.flush()
        os.fsync(output.fileno())


def replace(file: Path, data: bytes, scratch: Path) -> None:
    """Replaces a file's content at once, by way of another in `scratch`, which has to lie in
    the same file system. Never writes through: installers link files."""
    handle, temporary = tempfile.mkstemp(prefix=f"{STATE}.", dir=scratch)
    try:
        save(handle, data)
        if file.exists():
            own(Path(temporary), file.stat())
            shutil.copystat(file, temporary)  # with what security modules keep in attributes
            os.utime(temporary)
        else:
            own(Path(temporary), file.parent.stat())
            os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
