"""Am I affected? What a vLLM has of the defects, and of the overlay."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .. import releases
from ..cli import UserError
from . import PROGRAM
from .compile_cache import warnings
from .defects import DEFECTS, EVERYWHERE, KINDS, MODELS, Model, Unreadable, drops_levels
from .tree import OVERLAY, STATE, Tree, assigned

CLEAN, AFFECTED, UNKNOWN = 0, 1, 2
MIXIN = f"{MODELS}/deepstack.py"
# What registers classes, or replaces methods, over those that are judged here.
BESIDE = {
    "vllm_omni": "vllm-omni registers a Qwen3-Omni of its own over vLLM's: nothing here is about "
    "that one, and no patch of vLLM reaches it",
    "vllm_ascend": "vllm-ascend replaces Qwen3-VL's reading and clearing when it is loaded: what "
    "is said here of D1, D2 and D9 is of vLLM's own methods",
}
INTERNS1_PRO_DROPS = (
    "InternS1-Pro computes DeepStack levels and drops them, as released: whether the model was "
    "trained with them is not known here"
)
# Of one defect, in different models, the first of these is the worst.
STATES = (
    "present",
    "latent",
    "fixed by the overlay",
    "fixed",
    "fixed upstream",
    "not in this release",
    "not there",
)


@dataclass
class Status:
    tree: str
    release: str | None
    overlay: str
    """`not applied`, `applied`, `another version`, `interrupted`."""
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """By model and defect: one of `STATES`. `latent`: there, but no engine reaches it."""
    problem: str | None = None
    """Why it cannot be told."""
    warnings: list[str] = field(default_factory=list)
    """What the models' code does not show: older compiled graphs, other packages, and what is
    left as it is."""

    @property
    def defects(self) -> dict[str, str]:
        """By defect, the worst of its states in any model."""
        found: dict[str, str] = {}
        for name in DEFECTS:
            states = {of[name] for of in self.models.values() if name in of}
            if states:
                found[name] = min(states, key=STATES.index)
        return found

    @property
    def code(self) -> int:
        if self.problem:
            return UNKNOWN
        return AFFECTED if "present" in self.defects.values() else CLEAN

    def json(self) -> str:
        verdict = ("clean", "affected", "unknown")[self.code]
        return json.dumps(asdict(self) | {"defects": self.defects, "verdict": verdict}, indent=1)

    def text(self) -> str:
        lines = [f"vLLM {self.release or 'of unknown version'} in {self.tree}"]
        for name in self.defects:
            by_state: dict[str, list[str]] = {}
            for model, states in self.models.items():
                if name in states:
                    by_state.setdefault(states[name], []).append(model)
            lines.append(f"  {name:<4} {DEFECTS[name].title}")
            for state in sorted(by_state, key=STATES.index):
                lines.append(f"         {state}: {', '.join(by_state[state])}")
        lines.append(f"the overlay: {self.overlay}")
        lines += [f"warning: {text}" for text in self.warnings]
        if self.problem:
            lines.append(f"cannot tell: {self.problem}")
        elif self.code == AFFECTED:
            lines.append(f"affected; to fix it: {PROGRAM} apply {self.tree}")
        else:
            lines.append("clean")
        return "\n".join(lines)


def status(root: Path, overlay: Path = OVERLAY, cache_dir: Path | None = None) -> Status:
    """Reads the code; the version only tells fixed from never there. `cache_dir` is where
    engines are told to keep their compiled graphs, if they are."""
    version = read_version(root)
    found = Status(str(root), str(version) if version else None, overlay_state(root, overlay))
    if found.overlay == "interrupted":
        found.problem = f"{root}: apply or revert was interrupted; call `revert`, or `apply` again"
        return found
    if (root / MIXIN).is_file():
        found.warnings = warnings((root / MIXIN).stat().st_ctime, cache_dir)
    found.warnings += [text for name, text in BESIDE.items() if (root / name).is_dir()]
    problems = []
    for name, kind in KINDS.items():
        if not (root / kind.file).is_file() and name != EVERYWHERE:
            continue
        try:
            found.models[name] = states_of(name, Model(root, kind), version, found.overlay)
        except Unreadable as error:
            problems.append(f"{name}: {error}")
    try:
        if drops_levels(root):
            found.warnings.append(INTERNS1_PRO_DROPS)
    except Unreadable as error:
        problems.append(str(error))
    found.problem = "; ".join(problems) or None
    return found


def states_of(name: str, model: Model, version: Version | None, overlay: str) -> dict[str, str]:
    states = {}
    for defect, about in DEFECTS.items():
        if name not in about.models:
            continue
        present, released = about.models[name]
        if present(model):
            states[defect] = "latent" if about.latent else "present"
        elif version is None:
            states[defect] = "not there"
        elif released.contains(version):
            overlaid = overlay in ("applied", "another version")
            states[defect] = "fixed by the overlay" if overlaid else "fixed"
        elif any(released.contains(old) for old in releases.releases() if old < version):
            states[defect] = "fixed upstream"
        else:
            states[defect] = "not in this release"
    return states


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
    if not (root / MIXIN).is_file():
        return "not applied"
    try:
        return "another version" if Tree(root, overlay).changes() else "applied"
    except UserError:
        return "another version"
