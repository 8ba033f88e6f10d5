"""vLLM's files, known by their contents: what replaces each, what that fixes, what it needs.

The table is requirements/files.json, which `python -m tests.overlay.files` writes. The merged files
are made of it when the package is built. Only the standard library is imported: this runs in every
process of a server.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from threading import RLock
from typing import Any

from . import ROOT, STATE

TABLE = ROOT / "requirements" / "files.json"
HERE = Path(__file__).parent
BUILT = (HERE / "merged").is_dir()
"""Whether this is the package as it is installed, and no clone."""
FOLDER = HERE / "merged" if BUILT else ROOT / "build" / "merged"
"""Where the merged files are."""
NOTICE = b"# Changed by vllm-deepstack: this is not the file as vLLM released it.\n"
"""What a merged file says of itself, after the lines of its licence."""
NONE = ""
"""Stands for the sha256 of a file that vLLM does not have, and the fork adds."""


@dataclass(frozen=True, eq=False)
class File:
    """A file of vLLM's, as some release has it."""

    path: str
    """In vLLM: `vllm/model_executor/models/qwen3_vl.py`."""
    release: str
    """The first that has it."""
    merged: str | None
    """The sha256 of the file that replaces it; None where nothing has to change."""
    fixes: dict[str, list[str]] = field(default_factory=dict)
    """By model, the defects that end when this file is replaced."""
    needs: list[str] = field(default_factory=list)
    """The paths of other merged files that the merged file imports."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """By module of vLLM's, what the merged file imports and the original does not."""
    left: dict[str, list[str]] = field(default_factory=dict)
    """By model, the defects that the merged file leaves."""
    version: str = ""
    """The version of vllm-deepstack that made the merged file, if it is not this one."""

    def place_in(self, folder: Path) -> Path:
        """Of the merged file."""
        assert self.merged
        return folder / self.merged[:16] / Path(self.path).name

    @property
    def place(self) -> Path:
        return self.place_in(FOLDER)


@dataclass(frozen=True)
class Table:
    files: dict[str, dict[str, File]]
    """By path, and by the sha256 of the original."""
    earlier: dict[str, File]
    """By the sha256 of files that earlier versions have merged. `fixes` is what these fixed."""
    runners: dict[str, dict[str, str]]
    """The releases of model runners, by path and sha256: what the fixes were tested with."""
    defects: dict[str, str]
    """What each defect does. Not those that no engine reaches."""
    instead: dict[str, str]
    """By defect, what to do where the fork leaves it."""
    kinds: dict[str, tuple[str, str]]
    """By model, the module and the name of its class."""
    levels: dict[str, str]
    """By model, what its configuration calls the levels, if it is a matter of levels."""

    @cached_property
    def merged(self) -> dict[str, File]:
        """By the sha256 of the merged file; of originals that become the same, the oldest."""
        files = [f for of in self.files.values() for f in of.values()]
        return {f.merged: f for f in reversed(files) if f.merged}


@cache
def table() -> Table:
    read = json.loads(TABLE.read_text())
    files = {
        path: {sha: File(path, **entry) for sha, entry in of.items()}
        for path, of in read["files"].items()
    }
    earlier = {
        sha: File(path, merged=sha, **entry)
        for path, of in read["earlier"].items()
        for sha, entry in of.items()
    }
    kinds = {model: tuple(of) for model, of in read["kinds"].items()}
    same = {name: read[name] for name in ("runners", "defects", "instead", "levels")}
    return Table(files, earlier, kinds=kinds, **same)


def concerning(model: str) -> list[str]:
    """The paths of the files that a model's defects are in: its own, and those it inherits from."""
    own, _ = table().kinds[model]
    return [
        path
        for path, files in table().files.items()
        if module_of(path) == own or any(model in {**f.fixes, **f.left} for f in files.values())
    ]


def sha256(file: Path) -> str:
    """`NONE` for no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else NONE


def stamp(overlay: Mapping[str, bytes]) -> str:
    """Of all that the merged files are made of."""
    hashed = hashlib.sha256(TABLE.read_bytes())
    for path, data in overlay.items():
        hashed.update(path.encode() + hashlib.sha256(data).digest())
    return hashed.hexdigest()


def is_built(folder: Path, overlay: Mapping[str, bytes]) -> bool:
    """Whether the folder has all merged files of this overlay, each as it was made."""
    file = folder / "stamp"
    return (
        file.is_file()
        and file.read_text() == stamp(overlay)
        and all(sha256(f.place_in(folder)) == f.merged for _, f in replaced())
    )


def replaced() -> list[tuple[str, File]]:
    """With the sha256 of the originals."""
    return [(sha, f) for of in table().files.values() for sha, f in of.items() if f.merged]


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def path_of(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def lacking(root: Path, file: File, served: Collection[str] = ()) -> list[str]:
    """Of the merged files that one imports, those that the vLLM in `root` does not have, and that
    are not `served` to it."""
    known = table().merged
    return [n for n in file.needs if n not in served and sha256(root / n) not in known]


@cache
def content(file: File) -> bytes:
    """Of the merged file."""
    return file.place.read_bytes()


def why_unknown(root: Path, file: Path) -> str:
    """Of a file of the vLLM in `root`."""
    if not file.is_file():
        return "is missing"
    own = file.relative_to(root) if file.is_relative_to(root) else Path()
    if (root / STATE / "originals" / own).is_file() or NOTICE in file.read_bytes():
        return "was patched by another version of vllm-deepstack: run `vllm-deepstack apply`"
    return "is not from a release that vllm-deepstack knows"


@dataclass
class Installed:
    """The files of a vLLM, in the folder that has `vllm/`, and those that can replace them."""

    root: Path
    unknown: dict[str, str] = field(default_factory=dict)
    """Why files are left as they are, by path."""
    looked_up: dict[str, File | None] = field(default_factory=dict)
    lock: Any = field(default_factory=RLock)

    def replacement(self, path: str) -> File | None:
        """What replaces a file; None where it is fixed, or unknown, or needs what is unknown."""
        with self.lock:
            if path not in self.looked_up:
                self.looked_up[path] = None  # for two files that need each other
                try:
                    self.looked_up[path] = self._look_up(path)
                except Exception as error:  # the release's own file can be imported all the same
                    self.unknown[path] = f"cannot be read: {error}"
            return self.looked_up[path]

    def _look_up(self, path: str) -> File | None:
        digest = sha256(self.root / path)
        if merged := table().merged.get(digest):
            if missing := lacking(self.root, merged):
                self.unknown[path] = f"needs {missing[0]}, which is not as it was merged"
            return None
        found = table().files[path].get(digest)
        if found is None:
            if digest:
                self.unknown[path] = why_unknown(self.root, self.root / path)
            return None
        if not found.merged:
            return None
        if sha256(found.place) != found.merged:
            self.unknown[path] = f"has no merged file in {FOLDER}: install vllm-deepstack again"
            return None
        replaced = [other for other in found.needs if self.replacement(other)]
        if missing := lacking(self.root, found, replaced):
            self.unknown[path] = f"needs {missing[0]}, which cannot be replaced"
            return None
        for module, names in found.names.items():
            if missing := self.missing(module, names):
                self.unknown[path] = f"needs {missing[0]} of {module}, which is not there"
                return None
        return found

    def missing(self, module: str, names: list[str]) -> list[str]:
        """Of names that a module should have, those that its source does not mention."""
        base = self.root / module.replace(".", "/")
        file = next(
            (f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None
        )
        text = file.read_text(errors="replace") if file else ""
        return [name for name in names if not re.search(rf"\b{name}\b", text)]
