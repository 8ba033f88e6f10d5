"""A vLLM source tree on disk, and the overlay's way into it and out again."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from packaging.version import Version

from .. import ROOT, STATE, releases
from ..cli import UserError, uncollected
from ..merged import BUILT, FOLDER, NONE, NOTICE, content, is_built, table
from . import record
from .transaction import Files, Transaction, locked

OVERLAY = ROOT
MIXIN = "vllm/model_executor/models/deepstack.py"


@dataclass(frozen=True)
class Change:
    path: str
    before: bytes | None
    """None where the file is new."""
    after: bytes

    def diff(self) -> Iterator[str]:
        """As git writes it: `git apply` takes it."""
        before = record.lines(self.before) if self.before is not None else []
        old, new = f"a/{self.path}", f"b/{self.path}"
        yield f"diff --git {old} {new}\n"
        if self.before is None:
            yield "new file mode 100644\n"
            old = "/dev/null"
        for line in difflib.unified_diff(before, record.lines(self.after), old, new):
            yield line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"


@dataclass(frozen=True)
class Merged:
    """A file, and what the overlay makes of it. None: there is none."""

    path: str
    current: bytes | None
    """What is there, which may be merged already."""
    upstream: bytes | None
    after: bytes


class Tree:
    """A folder that contains `vllm/`: site-packages, an unpacked wheel or sdist, a checkout.

    Files are known by their contents. Those of a release are replaced by merged files that are at
    hand, if they are made of this overlay; others are merged with LibCST, as for `release`: by
    default, the release whose files the tree has most of.

    Raises:
        UserError: it contains no vLLM, or no file of a release.
    """

    def __init__(
        self,
        root: Path,
        overlay: Path | Mapping[str, bytes] = OVERLAY,
        release: str | None = None,
    ):
        self.root = root
        self.overlay = overlay_files(overlay) if isinstance(overlay, Path) else overlay
        self.built = self.overlay == our_overlay() and ours_is_built()
        if root.is_file():
            raise UserError(f"{root}: is a file; name a folder that contains vllm/")
        self.transaction = transaction(root, self.overlay.keys())
        if self.transaction.read("vllm/__init__.py") is None:
            raise UserError(f"{root}: no vLLM there: it has no vllm/__init__.py")
        manifest = self.transaction.manifest() or {}
        named = release or manifest.get("release")
        self.release = releases.known(named) if named else self._release()
        self.untested: list[str] = []
        """The paths of files that are from no release, and merged all the same."""

    def _release(self) -> releases.Release:
        known = releases.releases().values()
        paths = {path for release in known for path in release.sources}
        hashes = {path: digest(self._read(path)) for path in paths}

        def count(release: releases.Release) -> int:
            return sum(
                hashes[path] in (sha, table().files[path][sha].merged)
                for path, sha in release.sources.items()
            )

        found = max(reversed(known), key=count)
        if not count(found):
            raise UserError(
                f"{self.root}: none of its model files is from a release of vLLM that is known; "
                "name the release that it is closest to: --as RELEASE"
            )
        return found

    def _read(self, path: str) -> bytes | None:
        """A file as upstream has it: what `apply` put aside, else what is there."""
        original = self.transaction.original(path)
        return self.transaction.read(path) if original is None else original

    def plan(self) -> list[Merged]:
        """The overlay's files that this release needs.

        Raises:
            UserError: a file is merged already, and what it was is not there, or was edited
                since; or the overlay does not fit it.
        """
        manifest = self.manifest()
        upstream = {path: self._read(path) for path in self.overlay if path in self.release.sources}
        for path, data in upstream.items():
            if data is None:
                version = self.release.version
                raise UserError(f"{self.root / path}: missing, though vLLM {version} has it")
        found = []
        for path, data in self._after(upstream).items():
            merged = Merged(path, self.transaction.read(path), upstream.get(path), data)
            if merged.current not in (merged.after, merged.upstream) and (
                not manifest or digest(merged.current) != manifest["files"].get(path)
            ):
                raise UserError(
                    f"{self.root / path}: edited since the overlay was applied; undo that edit, or "
                    "install vLLM again"
                )
            found.append(merged)
        return found

    def _after(self, upstream: Files) -> dict[str, bytes]:
        known: dict[str, bytes] = {}
        self.untested = []
        for path in self.overlay:
            data = upstream.get(path)
            sha = digest(data) or NONE
            if data is not None and sha in table().merged:
                known[path] = data
            elif file := table().files.get(path, {}).get(sha):
                known[path] = content(file) if self.built and file.merged else data or b""
            elif data is not None:
                if sha in table().earlier or NOTICE in data:
                    raise UserError(
                        f"{self.root / path}: merged by another version of vllm-deepstack, and "
                        "what it was is not there; install vLLM again"
                    )
                self.untested.append(path)
        if self.built and not self.untested:
            return {p: data for p, data in known.items() if data is not None}
        try:
            from ..merge.merge import merge_all
        except ImportError as error:
            names = ", ".join(str(self.root / path) for path in self.untested)
            why = f"{names}: from no release that vllm-deepstack knows; to merge it all the same, "
            why = f"{why}untested" if names else "to merge another overlay"
            raise UserError(f"{why}: pip install libcst ({error})") from None
        with uncollected():
            merged = merge_all(self.overlay, upstream, self.release.version)
        return merged | (known if self.built else {})

    def changes(self) -> list[Change]:
        """What the overlay changes in the tree as it is: nothing once it is applied.

        Raises:
            UserError: as `plan`.
        """
        return changes(self.plan())

    def apply(self) -> list[Change]:
        """Merges in place, all or nothing; takes back what another version did first. Returns
        what it changed.

        Raises:
            UserError: as `plan`; or the tree cannot be written to, or another is at it.
        """
        with self._writing():
            self.transaction.recover()
            plan = self.plan()
            if not changes(plan):
                return []
            merged = {one.path: one for one in plan if one.after != one.upstream}
            after: Files = {path: merged[path].after for path in in_order(merged)}
            originals: Files = {path: merged[path].upstream for path in after}
            # RECORD first: it may name files that are not there yet, and must not miss one.
            for path, data in self._record(after, originals).items():
                originals = {path: self._read(path), **originals}
                after = {path: data, **after}
            self.transaction.guard([*after, *(f"{STATE}/originals/{path}" for path in after)])
            if self.transaction.manifest():
                self.transaction.take_back()  # what another version of the overlay has put there
            if not merged:
                return changes(plan)
            self.transaction.begin(originals, after, release=str(self.release.version))
            try:
                self.transaction.put(after)
                self.transaction.mark("applied")
            except BaseException:
                self.transaction.take_back()
                raise
            return changes(plan)

    def revert(self) -> list[str]:
        """Puts back the bytes that were there before `apply`. Returns the files' paths.

        Raises:
            UserError: nothing was applied, a file was edited since, the tree cannot be
                written to, or another is at it.
        """
        with self._writing():
            taken_back = self.transaction.recover()
            if self.transaction.manifest():
                return self.transaction.take_back()
            if not taken_back:
                raise UserError(f"{self.root}: the overlay was not applied here (no {STATE})")
            return taken_back

    @contextmanager
    def _writing(self) -> Iterator[None]:
        before = None
        try:
            with locked(self.root):
                before = self.transaction.manifest()
                yield
        except OSError as error:
            done = "the release's files are back" if before else "nothing was changed"
            if self.transaction.manifest():
                done = "call again, to finish or take back"
            if error.errno in (errno.EXDEV, errno.EBUSY):
                done += "; a part of it is another file system: use the plugin instead"
            raise UserError(f"{self.root}: cannot be written to: {error}; {done}") from error

    def manifest(self) -> dict | None:
        """What was applied; None if nothing was.

        Raises:
            UserError: an `apply` or `revert` was interrupted; or its manifest is not one.
        """
        manifest = self.transaction.manifest()
        if manifest and manifest["status"] != "applied":
            raise UserError(
                f"{self.root}: interrupted while {manifest['status']} the overlay; "
                "`revert` puts back what was there, `apply` does it again"
            )
        return manifest

    def _record(self, after: Files, originals: Files) -> dict[str, bytes]:
        """The installation's RECORD by its path, kept true; nothing where there is none."""
        files = {path: data for path, data in after.items() if data is not None}
        kept = [path for path, data in originals.items() if data is not None]
        for file in sorted(self.root.glob("vllm*.dist-info/RECORD")):
            own = file.relative_to(self.root).as_posix()
            before = self._read(own)
            assert before is not None
            if record.paths(before) & set(self.release.sources):
                return {own: record.patched(before, files, [*kept, own])}
        return {}


@cache
def our_overlay() -> dict[str, bytes]:
    return overlay_files(OVERLAY)


@cache
def ours_is_built() -> bool:
    """Whether the merged files that are at hand are made of this overlay."""
    return BUILT or is_built(FOLDER, our_overlay())


def in_order(paths: Collection[str]) -> list[str]:
    """The mixin first, and each file after those that its merged file imports: as many of them as
    there are, from the first on, can be imported beside the release's others."""
    needs = {
        path: {need for file in of.values() for need in file.needs}
        for path, of in table().files.items()
    }
    graph = {path: sorted({MIXIN, *needs.get(path, ())} - {path}) for path in sorted(paths)}
    return [path for path in TopologicalSorter(graph).static_order() if path in paths]


def changes(plan: list[Merged]) -> list[Change]:
    return [Change(one.path, one.current, one.after) for one in plan if one.current != one.after]


def digest(data: bytes | None) -> str | None:
    return None if data is None else releases.sha256(data)


def overlay_files(overlay: Path) -> dict[str, bytes]:
    """By path.

    Raises:
        UserError: there are none.
    """
    found = sorted((overlay / "vllm").rglob("*.py"))
    if not found:
        raise UserError(f"{overlay}: no overlay there: it has no vllm/**/*.py")
    return {path.relative_to(overlay).as_posix(): path.read_bytes() for path in found}


def transaction(root: Path, paths: Set[str]) -> Transaction:
    """Of a tree, for an overlay's files and those of all releases that the overlay knows."""
    known = {path for release in releases.releases().values() for path in release.sources}
    return Transaction(root, digest, known | paths)


def version_of(root: Path) -> Version | None:
    """What `_version.py` assigns to `__version__`; None where there is none."""
    with suppress(OSError, ValueError):
        text = (root / "vllm" / "_version.py").read_text()
        if match := re.search(r"^__version__ = (?:version = )?['\"](.+)['\"]$", text, re.MULTILINE):
            return Version(match[1])
    return None


def public_version(root: Path) -> Version | None:
    """Without the local part, which names a build."""
    version = version_of(root)
    return Version(version.public) if version else None
