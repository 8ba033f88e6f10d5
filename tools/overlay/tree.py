"""A vLLM source tree on disk, and the overlay's way into it and out again."""

from __future__ import annotations

import ast
import base64
import csv
import difflib
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .. import releases
from . import OverlayError
from .merge import added, is_needed, merge
from .transaction import STATE, Files, Transaction, locked

OVERLAY = releases.ROOT


@dataclass(frozen=True)
class Change:
    path: str
    before: bytes | None
    """None where the file is new."""
    after: bytes

    def diff(self) -> Iterator[str]:
        """As git writes it: `git apply` takes it."""
        before = lines(self.before) if self.before is not None else []
        old, new = f"a/{self.path}", f"b/{self.path}"
        yield f"diff --git {old} {new}\n"
        if self.before is None:
            yield "new file mode 100644\n"
            old = "/dev/null"
        for line in difflib.unified_diff(before, lines(self.after), old, new):
            yield line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"


def lines(data: bytes) -> list[str]:
    return list(io.StringIO(data.decode(), newline="\n"))


class Tree:
    """A folder that contains `vllm/`: site-packages, an unpacked wheel or sdist, a checkout.

    Raises:
        OverlayError: it contains none, or one of a release that is not known.
    """

    def __init__(self, root: Path, overlay: Path = OVERLAY):
        self.root = root
        self.transaction = Transaction(root, digest)
        self.overlay = {
            path.relative_to(overlay).as_posix(): path.read_bytes()
            for path in sorted((overlay / "vllm").rglob("*.py"))
        }
        if not self.overlay:
            raise OverlayError(f"{overlay}: no overlay there: it has no vllm/**/*.py")
        if not (root / "vllm" / "__init__.py").is_file():
            raise OverlayError(f"{root}: no vLLM there: it has no vllm/__init__.py")
        self.release = self._release()

    def _release(self) -> releases.Release:
        table = releases.releases()
        version_file = self.root / "vllm" / "_version.py"
        if version_file.exists():
            version = assigned(version_file, "__version__")
            try:
                public = Version(Version(str(version)).public)
            except InvalidVersion:
                raise OverlayError(f"{version_file}: no version found in it") from None
            if public in table:
                return table[public]
        else:  # a checkout that was never built: it is known by its files
            version = "of unknown version"
            for release in table.values():
                if all(self._hash(path) == digest for path, digest in release.sources.items()):
                    return release
        raise OverlayError(
            f"{self.root}: unknown release: vLLM {version}; the overlay knows "
            + ", ".join(map(str, table))
        )

    def _read(self, path: str) -> bytes | None:
        """A file as upstream has it: what `apply` put aside, else what is there."""
        original = self.transaction.original(path)
        file = self.root / path
        return original if original is not None or not file.is_file() else file.read_bytes()

    def _hash(self, path: str) -> str | None:
        data = self._read(path)
        return None if data is None else releases.sha256(data)

    def changes(self) -> list[Change]:
        """What the overlay changes in the tree as it is: nothing once it is applied.

        Raises:
            OverlayError: a file is not the release's, or the overlay does not fit it.
        """
        manifest = self._manifest()
        found = []
        for path, upstream, after in self._merged():
            file = self.root / path
            current = self.transaction.read(path)
            if upstream is None:
                foreign = current not in (None, after)
            else:
                foreign = (current != after and current != upstream) or (
                    upstream != after and releases.sha256(upstream) != self.release.sources[path]
                )
            if foreign and (not manifest or digest(current) != manifest["files"].get(path)):
                raise OverlayError(
                    f"{file}: not as vLLM {self.release.version} was released: edited by someone "
                    "else; reinstall vLLM or undo the edit"
                )
            if current != after:
                found.append(Change(path, current, after))
        return found

    def _merged(self) -> Iterator[tuple[str, bytes | None, bytes]]:
        """Path, upstream's file if there is one, and that with the overlay's in it."""
        version = self.release.version
        for path, ours in self.overlay.items():
            if not is_needed(ours, path=path, release=version):
                continue
            if path not in self.release.sources:
                yield path, None, added(ours, path=path, release=version)
                continue
            upstream = self._read(path)
            if upstream is None:
                raise OverlayError(f"{self.root / path}: missing, though vLLM {version} has it")
            after = merge(ours, upstream, path=path, release=version, overlay=self.overlay)
            yield path, upstream, after

    def apply(self) -> list[Change]:
        """Merges in place, all or nothing. Returns what it changed.

        Raises:
            OverlayError: as `changes`; or the tree cannot be written to, or another is at it.
        """
        with self._writing():
            self.transaction.recover()
            changes = self.changes()
            if not changes:
                return []
            merged = [Change(*change) for change in self._merged() if change[1] != change[2]]
            # What an overlay before this one has changed, and this one does not, goes back.
            applied = (self.transaction.manifest() or {"files": {}})["files"]
            left = [path for path in applied if path.startswith("vllm/")]
            left = [path for path in left if path not in {change.path for change in merged}]
            back = {path: self.transaction.original(path) for path in left}
            kept = [Change(path, data, data) for path, data in back.items() if data is not None]
            record = self._record([*merged, *kept])
            # RECORD first: it may name files that are not there yet, and must not miss one.
            written = [*([record] if record else []), *merged]
            after: Files = {**{change.path: change.after for change in written}, **back}
            originals: Files = {**{change.path: change.before for change in written}, **back}
            self.transaction.begin(originals, after, release=str(self.release.version))
            try:
                self.transaction.put(after)
                self.transaction.done()
            except BaseException:
                self.transaction.take_back()
                raise
            return changes

    def revert(self) -> list[str]:
        """Puts back the bytes that were there before `apply`. Returns the files' paths.

        Raises:
            OverlayError: nothing was applied, a file was edited since, the tree cannot be
                written to, or another is at it.
        """
        with self._writing():
            taken_back = self.transaction.recover()
            if self.transaction.manifest():
                return self.transaction.take_back()
            if not taken_back:
                raise OverlayError(f"{self.root}: the overlay was not applied here (no {STATE})")
            return taken_back

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with locked(self.root):
                yield
        except OSError as error:
            manifest = self.transaction.manifest()
            done = "call again, to finish or take back" if manifest else "nothing was changed"
            raise OverlayError(f"{self.root}: cannot be written to: {error}; {done}") from error

    def _manifest(self) -> dict | None:
        """What was applied; None if nothing was.

        Raises:
            OverlayError: an `apply` or `revert` was interrupted.
        """
        manifest = self.transaction.manifest()
        if manifest and manifest["status"] != "applied":
            raise OverlayError(
                f"{self.root}: interrupted while {manifest['status']} the overlay; "
                "`revert` puts back what was there, `apply` does it again"
            )
        return manifest

    def _record(self, changes: list[Change]) -> Change | None:
        """The change that keeps an installation's RECORD true; None where there is none."""
        paths = {change.path: change.after for change in changes}
        for file in sorted(self.root.glob("vllm*.dist-info/RECORD")):
            own = file.relative_to(self.root).as_posix()
            before = self._read(own)
            assert before is not None
            record, known = [], set()
            for line in lines(before):
                path = next(csv.reader([line]))[0]
                known.add(path)
                end = line[len(line.rstrip("\r\n")) :]
                record.append(record_row(path, paths[path]) + end if path in paths else line)
            if not known & set(self.release.sources):
                continue
            end = "\r\n" if record[0].endswith("\r\n") else "\n"
            kept = [*(c.path for c in changes if c.before is not None), own]
            record += [record_row(c.path, c.after) + end for c in changes if c.path not in known]
            record += [f"{STATE}/{name},,{end}" for name in (".gitignore", "manifest.json")]
            record += [f"{STATE}/originals/{path},,{end}" for path in kept]
            return Change(own, before, "".join(record).encode())
        return None


def record_row(path: str, data: bytes) -> str:
    """A RECORD's line for a file, as the wheel format has it."""
    hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={hashed},{len(data)}"


def digest(data: bytes | None) -> str | None:
    return None if data is None else releases.sha256(data)


def assigned(file: Path, name: str) -> object:
    """The literal that a module assigns to a name; None if it does not."""
    for statement in ast.parse(file.read_text()).body:
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Constant)
            and any(isinstance(t, ast.Name) and t.id == name for t in statement.targets)
        ):
            return statement.value.value
    return None
