"""Am I affected? What a vLLM has of the defects, and of the overlay."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .. import releases
from . import PROGRAM, OverlayError
from .compile_cache import warnings
from .defects import DEFECTS, MIXIN, MODELS, Unreadable
from .tree import OVERLAY, STATE, Tree, assigned

CLEAN, AFFECTED, UNKNOWN = 0, 1, 2


@dataclass
class Status:
    tree: str
    release: str | None
    overlay: str
    """`not applied`, `applied`, `another version`, `interrupted`."""
    defects: dict[str, str] = field(default_factory=dict)
    """By name: `present`, `mended by the overlay`, `mended upstream`, `not in this release`."""
    problem: str | None = None
    """Why it cannot be told."""
    warnings: list[str] = field(default_factory=list)
    """What the code does not show: compiled graphs that are older than it."""

    @property
    def code(self) -> int:
        if self.problem:
            return UNKNOWN
        return AFFECTED if "present" in self.defects.values() else CLEAN

    def json(self) -> str:
        verdict = ("clean", "affected", "unknown")[self.code]
        return json.dumps(asdict(self) | {"verdict": verdict}, indent=1)

    def text(self) -> str:
        lines = [f"vLLM {self.release or 'of unknown version'} in {self.tree}"]
        for name, state in self.defects.items():
            lines.append(f"  {name:<4} {DEFECTS[name].title:<50} {state}")
        lines.append(f"the overlay: {self.overlay}")
        lines += [f"warning: {text}" for text in self.warnings]
        if self.problem:
            lines.append(f"cannot tell: {self.problem}")
        elif self.code == AFFECTED:
            lines.append(f"affected; to mend it: {PROGRAM} apply {self.tree}")
        else:
            lines.append("clean")
        return "\n".join(lines)


def status(root: Path, overlay: Path = OVERLAY, cache_dir: Path | None = None) -> Status:
    """Reads the code; the version only tells mended from never there. `cache_dir` is where
    engines are told to keep their compiled graphs, if they are."""
    version = read_version(root)
    found = Status(str(root), str(version) if version else None, overlay_state(root, overlay))
    if found.overlay == "interrupted":
        found.problem = f"{root}: apply or revert was interrupted; call `revert`, or `apply` again"
        return found
    mixin = root / MODELS / MIXIN[0]
    if mixin.is_file():
        found.warnings = warnings(mixin.stat().st_ctime, cache_dir)
    for name, defect in DEFECTS.items():
        try:
            present = defect.present(root / MODELS)
        except Unreadable as error:
            found.problem = str(error)
            found.defects = {}
            return found
        if present:
            found.defects[name] = "present"
        elif version is None:
            found.defects[name] = "not there"
        elif defect.released.contains(version):
            overlaid = found.overlay in ("applied", "another version")
            found.defects[name] = "mended by the overlay" if overlaid else "mended"
        elif any(defect.released.contains(old) for old in releases.releases() if old < version):
            found.defects[name] = "mended upstream"
        else:
            found.defects[name] = "not in this release"
    return found


def read_version(root: Path) -> Version | None:
    file = root / "vllm" / "_version.py"
    try:
        text = assigned(file, "__version__") if file.is_file() else None
        return Version(Version(str(text)).public) if text else None
    except (InvalidVersion, SyntaxError):
        return None


def overlay_state(root: Path, overlay: Path) -> str:
    manifest = root / STATE / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text())["status"] != "applied":
        return "interrupted"
    if not (root / MODELS / MIXIN[0]).is_file():
        return "not applied"
    try:
        return "another version" if Tree(root, overlay).changes() else "applied"
    except OverlayError:
        return "another version"
