"""Am I affected? What a vLLM has of the defects, and of the overlay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version

from .. import releases
from ..cli import UserError
from .compile_cache import warnings
from .defects import DEFECTS, EVERYWHERE, KINDS, Code, Model, Unreadable, drops_levels
from .tree import MIXIN, OVERLAY, Tree, overlay_files, transaction, version_of

SCHEMA = 1
"""Of `--json`: docs/schemas/status.json. Another number when a field changes its meaning."""

CLEAN, AFFECTED, UNKNOWN = 0, 1, 2
# What registers classes, or replaces methods, over those that are judged here.
COPIES = ("tpu_inference", "vllm_gaudi", "vllm_rbln")
BESIDE = {
    "vllm_omni": "vllm-omni registers a Qwen3-Omni of its own over vLLM's: nothing here is about "
    "that one, and no patch of vLLM reaches it",
    "vllm_ascend": "vllm-ascend replaces Qwen3-VL's reading and clearing when it is loaded: what "
    "is said here of D1, D2 and D9 is of vLLM's own methods",
}
OWN = "has models of its own, or changes vLLM's: nothing here is about those"
BESIDE |= {name: f"{name.replace('_', '-')} {OWN}" for name in COPIES}
INTERNS1_PRO_DROPS = (
    "InternS1-Pro computes DeepStack levels and drops them, as released: whether the model was "
    "trained with them is not known here"
)
FIXES = {
    "plugin": "the plugin, when vLLM imports its models; the files are as released",
    "patch": "a patch of the files, as `vllm-deepstack apply` makes it",
    "wheel": "a `vllm` wheel that has the fixes",
}
LEFT = "left by the overlay"
# Of one defect, in different models, the first of these is the worst.
STATES = (
    "present",
    LEFT,
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
    """In the files: `not applied`, `applied`, `another version`, `interrupted`, `unreadable`."""
    fix: str | None = None
    """How the fix gets in: one of `FIXES`; None: not at all."""
    plugin: str | None = None
    """What the plugin says of this vLLM, or why it does not run; None where it is not installed."""
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """By model and defect: one of `STATES`. `latent`: there, but no engine reaches it. `left by the
    overlay`: there, and a warning says what to do instead."""
    lint: list[str] = field(default_factory=list)
    """What `vllm-deepstack lint` finds in models that have no rule here."""
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
        # DS003 is latent: there is a row for every token that a step can schedule (D5).
        found = any(not text.startswith("DS003") for text in self.lint)
        return AFFECTED if found or "present" in self.defects.values() else CLEAN

    def json(self) -> dict[str, Any]:
        verdict = ("clean", "affected", "unknown")[self.code]
        of = {"schema": SCHEMA, **asdict(self)}
        return of | {"defects": self.defects, "verdict": verdict}

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
        lines.append(f"fixed by: {FIXES[self.fix]}" if self.fix else "fixed by: nothing")
        if self.plugin:
            lines.append(f"plugin: {self.plugin}")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"lint finds {text}" for text in self.lint]
        if self.problem:
            lines.append(f"cannot tell: {self.problem}")
        elif self.code == AFFECTED and "present" not in self.defects.values():
            lines.append("affected, in models for which vllm-deepstack has no fix")
        elif self.code == AFFECTED:
            lines.append(
                "affected; to fix it, install vllm-deepstack beside this vLLM, or: vllm-deepstack "
                f"apply {self.tree}"
            )
        else:
            lines.append("clean")
        return "\n".join(lines)


def status(
    root: Path,
    overlay: Path = OVERLAY,
    cache_dir: Path | None = None,
    served: Mapping[str, bytes] | None = None,
    since: float | None = None,
) -> Status:
    """Reads the code; the version only tells fixed from never there. `cache_dir` is where
    engines are told to keep their compiled graphs, if they are. `served` is what the plugin
    serves in place of the files, `since` seconds since the epoch."""
    code = Code(root, served or {})
    version, problems = public_version(root), []
    state, problem = overlay_state(root, overlay)
    found = Status(str(root), str(version) if version else None, state, fix_of(root, state, served))
    if problem:
        found.problem = problem
        return found
    if (root / MIXIN).is_file():
        since = (root / MIXIN).stat().st_ctime
    if since is not None:
        found.warnings = warnings(since, cache_dir)
    found.warnings += [text for name, text in BESIDE.items() if (root / name).is_dir()]
    for name, kind in KINDS.items():
        if not code.has(kind.file) and name != EVERYWHERE:
            continue
        try:
            found.models[name] = states_of(name, Model(code, kind), version, bool(found.fix))
        except Unreadable as error:
            problems.append(f"{name}: {error}")
    try:
        if drops_levels(code):
            found.warnings.append(INTERNS1_PRO_DROPS)
    except Unreadable as error:
        problems.append(str(error))
    found.warnings += left_in(found.models, version)
    found.problem = "; ".join(problems) or None
    return found


def left_in(models: Mapping[str, dict[str, str]], version: Version | None) -> list[str]:
    """What to do about that which the overlay leaves, and is no part of the verdict."""
    by_text: dict[str, list[str]] = {}
    for model, states in models.items():
        for name, state in states.items():
            if state == LEFT and version:
                text = f"{name} is as released here: {DEFECTS[name].left(model, version)}"
                by_text.setdefault(text, []).append(model)
    return [f"{', '.join(models)}: {text}" for text, models in by_text.items()]


def states_of(name: str, model: Model, version: Version | None, overlaid: bool) -> dict[str, str]:
    states = {}
    for defect, about in DEFECTS.items():
        if name not in about.models:
            continue
        present, released = about.models[name]
        if present(model):
            left = overlaid and version is not None and about.left(name, version) is not None
            states[defect] = LEFT if left else "latent" if about.latent else "present"
        elif version is None:
            states[defect] = "not there"
        elif released.contains(version):
            states[defect] = "fixed by the overlay" if overlaid else "fixed"
        elif any(released.contains(old) for old in releases.releases() if old < version):
            states[defect] = "fixed upstream"
        else:
            states[defect] = "not in this release"
    return states


def public_version(root: Path) -> Version | None:
    """Without the local part, which names a build; None where none is to be read."""
    try:
        version = version_of(root)
    except UserError:
        return None
    return Version(version.public) if version else None


def fix_of(root: Path, overlay: str, served: Mapping[str, bytes] | None) -> str | None:
    if served:
        return "plugin"
    if overlay not in ("applied", "another version"):
        return None
    return "wheel" if is_fork(root) else "patch"


def is_fork(root: Path) -> bool:
    """Whether a vLLM's version is one of the fork's wheels: 0.22.1+deepstack.2."""
    try:
        version = version_of(root)
    except UserError:
        return False
    return bool(version and version.local and version.local.startswith("deepstack"))


def overlay_state(root: Path, overlay: Path) -> tuple[str, str | None]:
    """One of the states of `Status.overlay`, and what is wrong with it."""
    try:
        manifest = transaction(root, overlay_files(overlay).keys()).manifest()
    except UserError as error:
        return "unreadable", str(error)
    if manifest and manifest["status"] != "applied":
        return "interrupted", (
            f"{root}: apply or revert was interrupted; call `revert`, or `apply` again"
        )
    if not (root / MIXIN).is_file():
        return "not applied", None
    try:
        return "another version" if Tree(root, overlay).changes() else "applied", None
    except UserError:
        return "another version", None
