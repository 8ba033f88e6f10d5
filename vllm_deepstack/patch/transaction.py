"""Files of a tree put in place all or none, whatever stops it: killed, no space, two at once.

What a transaction needs lies in `.vllm-deepstack`, which comes and goes by a rename: the
originals, and a manifest that says how far it is. All files in vllm/ change at once: a copy
of the folder that has them, of links, takes the folder's place in one system call. Where the
file system cannot do that (overlayfs, for a folder of a lower layer), or something is mounted
there, file after file is replaced, and a kill in between leaves some of them for the next call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from .. import STATE
from ..cli import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
RECORD = re.compile(r"vllm[\w.+-]*\.dist-info/RECORD")
SHA256 = re.compile(r"[0-9a-f]{64}")
Files = dict[str, bytes | None]
"""Contents by path in the tree; None for no file."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One at a time.

    Raises:
        UserError: another is at work.
    """
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
        self.released: Mapping[str, str] = {}
        """The sha256 of the release's own files by path, once the release is known."""

    def manifest(self) -> dict | None:
        """What was noted of a change; None if nothing was.

        Raises:
            UserError: it is not as `begin` and `mark` write it.
        """
        data = self.read(f"{STATE}/manifest.json")
        if data is None and not os.path.lexists(self.folder):
            return None
        try:
            manifest = json.loads(data or b"")
            self.check(manifest, {"applying", "applied", "reverting"})
            if "previous" in manifest:
                self.check(manifest["previous"], {"applied"})
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.folder / 'manifest.json'}: not as vllm-deepstack wrote it: {error}; "
                f"delete {self.folder}, and install vLLM again"
            ) from None
        return manifest

    def check(self, manifest: object, statuses: Set[str]) -> None:
        """Raises ValueError."""
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
        if manifest.get("status") not in [*statuses]:  # it may be of any type
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
        return self.kept("originals", path)

    def kept(self, kind: str, path: str) -> bytes | None:
        return self.read(f"{STATE}/{kind}/{path}")

    def begin(self, originals: Files, after: Files, **facts: str) -> None:
        """Notes what is put in place of what. Over what was applied before, that is kept as well,
        and comes back if this is interrupted."""
        files = {path: self.digest(data) for path, data in after.items()}
        manifest = {**facts, "status": "applying", "files": files}
        if previous := self.manifest():
            now = {path: self.read(path) for path in after}
            self.keep("originals", originals, self.folder)
            self.keep("previous", now, self.folder)
            self.write(manifest | {"previous": previous})
            return
        made = Path(tempfile.mkdtemp(prefix=f"{STATE}.", dir=self.root))
        try:
            (made / ".gitignore").write_text("*\n")
            self.keep("originals", originals, made)
            (made / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for path in (made, *made.rglob("*")):  # whoever can read the tree, whatever the umask
                path.chmod(0o755 if path.is_dir() else 0o644)
                own(path, self.root.stat())
            made.rename(self.folder)
        except BaseException:
            shutil.rmtree(made)
            raise

    def keep(self, kind: str, files: Files, folder: Path) -> None:
        for path, data in files.items():
            if data is not None:
                file = folder / kind / path
                for parent in [*reversed(file.relative_to(folder).parents)][1:]:
                    if not (folder / parent).exists():
                        (folder / parent).mkdir()
                        (folder / parent).chmod(0o755)
                        own(folder / parent, self.root.stat())
                replace(file, data, self.root)

    def write(self, manifest: dict) -> None:
        replace(self.folder / "manifest.json", json.dumps(manifest, indent=2).encode(), self.root)

    def mark(self, status: str) -> None:
        self.write((self.manifest() or {}) | {"status": status})

    def done(self) -> None:
        """All is in place."""
        manifest = (self.manifest() or {}) | {"status": "applied"}
        self.write({key: value for key, value in manifest.items() if key != "previous"})
        shutil.rmtree(self.folder / "previous", ignore_errors=True)

    def put(self, files: Files) -> None:
        """In the order of `files`, and all that are in vllm/ at once."""
        for _, paths in groupby(files, key=lambda path: Path(path).parts[0]):
            here = list(paths)
            folder = Path(os.path.commonpath([str(Path(path).parent) for path in here]))
            relative = {str(Path(path).relative_to(folder)): files[path] for path in here}
            if len(here) == 1 or not self.swap(self.root / folder, relative):
                for path in here:
                    place(self.root / path, files[path], self.root)

    def swap(self, folder: Path, files: Files) -> bool:
        """Changes files in a folder, by their paths there, at once; False if that cannot be done
        here."""
        if mounted_below(folder):  # it would go with the folder, and be deleted there
            return False
        copy = Path(tempfile.mkdtemp(prefix=f"{STATE}.", dir=self.root)) / folder.name
        try:
            shutil.copytree(folder, copy, symlinks=True, copy_function=link)
            for path in (folder, *folder.rglob("*")):
                own(copy / path.relative_to(folder), path.lstat())
            for name, data in files.items():
                place(copy / name, data, self.root)
            exchange(folder, copy)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBUSY):
                return False
            raise
        finally:
            shutil.rmtree(copy.parent, ignore_errors=True)
        return True

    def take_back(self) -> list[str]:
        """Puts back what was there: the originals, or what an interrupted `apply` found applied.
        Returns the files' paths.

        Raises:
            UserError: a file is neither the original nor what was put there.
        """
        manifest = self.manifest()
        assert manifest
        previous = manifest.get("previous")
        kind = "previous" if previous else "originals"
        before = {path: self.kept(kind, path) for path in manifest["files"]}
        for path in () if previous else before:
            expected = self.released.get(path)
            if expected and self.digest(before[path]) != expected:
                raise UserError(
                    f"{self.folder / 'originals' / path}: missing, or not the release's; delete "
                    f"{self.folder}, and install vLLM again"
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
        self.refuse_links(left)
        self.mark("reverting")
        self.put(left)
        if previous:
            self.write(previous)
            shutil.rmtree(self.folder / "previous")
        else:
            self.end()
        return list(before)

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

    def now(self, path: str) -> str | None:
        return self.digest(self.read(path))

    def end(self) -> None:
        """Removes the folder: at once, and then bit by bit."""
        gone = Path(tempfile.mkdtemp(prefix=f"{STATE}.", dir=self.root))
        self.folder.rename(gone / "done")
        shutil.rmtree(gone)

    def recover(self) -> list[str]:
        """After a kill: finishes what was all in place, and takes back the rest.

        Returns the paths of the files that it took back.
        """
        for left in self.root.glob(f"{STATE}.*"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        manifest = self.manifest()
        if manifest is None or manifest["status"] == "applied":
            shutil.rmtree(self.folder / "previous", ignore_errors=True)
            return []
        in_place = all(self.now(path) == after for path, after in manifest["files"].items())
        if manifest["status"] == "applying" and in_place:
            self.done()
            return []
        return self.take_back()


def link(source: str, target: str) -> None:
    """A second name for a file; a copy where there are no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


def mounted_below(folder: Path) -> bool:
    """Whether something is mounted on, or below, a folder."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return any(folder.resolve() in (Path(p), *Path(p).parents) for p in points)


def exchange(one: Path, other: Path) -> None:
    """Exchanges two folders, in one system call. Linux.

    Raises:
        OSError: the file system cannot (EXDEV, EINVAL), or the system cannot (ENOSYS).
    """
    sys.audit("vllm_deepstack.exchange", str(one), str(other))
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))


def own(path: Path, like: os.stat_result) -> None:
    """Gives a file or folder the owner and the group of another."""
    now = path.lstat()
    if (now.st_uid, now.st_gid) != (like.st_uid, like.st_gid):
        os.chown(path, like.st_uid, like.st_gid, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(now.st_mode))  # chown takes bits away


def place(file: Path, data: bytes | None, scratch: Path) -> None:
    """A file's content, or no file; and none of what Python compiled of another."""
    if data is None:
        file.unlink(missing_ok=True)
    else:
        replace(file, data, scratch)
    cache = file.parent / "__pycache__"
    for cached in () if cache.is_symlink() else cache.glob(f"{file.stem}.*.pyc"):
        cached.unlink(missing_ok=True)


def replace(file: Path, data: bytes, scratch: Path) -> None:
    """Replaces a file's content at once, by way of another in `scratch`, which has to lie in
    the same file system. Never writes through: installers link files."""
    handle, temporary = tempfile.mkstemp(prefix=f"{STATE}.", dir=scratch)
    try:
        with os.fdopen(handle, "wb") as output:
            output.write(data)
            output.flush()
            os.fsync(output.fileno())
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
