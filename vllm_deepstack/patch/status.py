"""Am I affected? What a vLLM has of the defects, by its files' contents."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import STATE, releases
from ..cli import UserError
from ..merged import NONE, File, concerning, lacking, path_of, sha256, table, why_unknown
from .compile_cache import warnings
from .models import BACKEND
from .tree import MIXIN, public_version, transaction, version_of

SCHEMA = 2
"""Of `--json`: docs/schemas/status.json. Another number when a field changes its meaning."""

CLEAN, AFFECTED, UNKNOWN = 0, 1, 2
PRESENT, LEFT, FIXED = "present", "left by the overlay", "fixed"
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
FIXES = {
    "plugin": "the plugin, when vLLM imports its models; the files are as released",
    "patch": "a patch of the files, as `vllm-deepstack apply` makes it",
    "wheel": "a `vllm` wheel that has the fixes",
}


@dataclass
class Status:
    tree: str
    release: str | None
    """What it says of itself. Nothing is judged by it."""
    overlay: str = "not applied"
    """In the files: `not applied`, `applied`, `another version`, `interrupted`, `unreadable`."""
    fix: str | None = None
    """How the fix gets in: one of `FIXES`; None: not at all."""
    plugin: str | None = None
    """What the plugin says of this vLLM, or why it does not run; None where it is not installed."""
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """By model and defect that its release has: `present`, `fixed`, or `left by the overlay`, of
    which a warning says what to do instead."""
    unknown: dict[str, list[str]] = field(default_factory=dict)
    """By model, why it cannot be told."""
    hints: list[str] = field(default_factory=list)
    """What `vllm-deepstack lint` finds in files that are not known. They decide nothing."""
    problem: str | None = None
    """Why nothing can be told."""
    warnings: list[str] = field(default_factory=list)
    """What the models' files do not show: older compiled graphs, other packages, and what is
    left as it is."""

    @property
    def is_present(self) -> bool:
        """Whether any model has a defect for which there is a fix."""
        return any(PRESENT in states.values() for states in self.models.values())

    @property
    def code(self) -> int:
        if self.problem:
            return UNKNOWN
        if self.is_present:
            return AFFECTED
        if [*self.models] == [BACKEND] and LEFT in self.models[BACKEND].values():
            return AFFECTED  # and this model is served in no other way
        return UNKNOWN if self.unknown else CLEAN

    def warn(self, text: str) -> None:
        """Once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def json(self) -> dict[str, Any]:
        verdict = ("clean", "affected", "unknown")[self.code]
        return {"schema": SCHEMA, **asdict(self), "verdict": verdict}

    def text(self) -> str:
        """Of each defect, which models have it as released, and now."""
        lines = [f"vLLM {self.release or 'of unknown version'} in {self.tree}"]
        for name, title in table().defects.items():
            of = {model: states[name] for model, states in self.models.items() if name in states}
            still = [model for model, state in of.items() if state != FIXED]
            now = "fixed" if not still else "the same" if len(still) == len(of) else ""
            if of:
                lines.append(f"  {name:<4} {title}")
                lines.append(f"         {'as released' if self.fix else 'in'}: {', '.join(of)}")
            if of and self.fix:
                lines.append(f"         now: {now or ', '.join(still)}")
        return "\n".join([*lines, *self.lines()])

    def lines(self) -> list[str]:
        lines = [f"fixed by: {FIXES[self.fix]}" if self.fix else "fixed by: nothing"]
        if self.plugin:
            lines.append(f"plugin: {self.plugin}")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"cannot tell of {model}: {'; '.join(w)}" for model, w in self.unknown.items()]
        lines += [f"a hint, by lint: {text}" for text in self.hints]
        if self.problem:
            lines.append(f"cannot tell: {self.problem}")
        elif self.code == AFFECTED and not self.is_present:
            lines.append("affected")
        elif self.code == AFFECTED:
            lines.append(
                "affected; to fix it, install vllm-deepstack beside this vLLM, or: vllm-deepstack "
                f"apply {self.tree}"
            )
        elif self.code == CLEAN:
            lines.append("clean")
        return lines


def status(
    root: Path,
    cache_dir: Path | None = None,
    served: Mapping[str, File] | None = None,
    since: float | None = None,
    models: Collection[str] | None = None,
) -> Status:
    """Of all models, or of some. `cache_dir` is where engines are told to keep their compiled
    graphs, if they are. `served` is what the plugin serves in place of files, by their paths,
    `since` seconds since the epoch."""
    version, served = public_version(root), served or {}
    found = Status(str(root), str(version) if version else None)
    if not (root / "vllm" / "__init__.py").is_file():
        found.problem = f"{root}: no vLLM there: it has no vllm/__init__.py"
        return found
    try:
        manifest = transaction(root, table().files.keys()).manifest() or {}
    except UserError as error:
        found.overlay, found.problem = "unreadable", str(error)
        return found
    if manifest.get("status", "applied") != "applied":
        found.overlay = "interrupted"
        found.problem = f"{root}: apply or revert was interrupted; call `revert`, or `apply` again"
        return found
    if not any((root / path_of(module)).is_file() for module, _ in table().kinds.values()):
        found.problem = f"{root}: it has none of vLLM's models"
    merged: dict[str, File] = {}
    for model, (module, _) in table().kinds.items():
        if models and model not in models:
            continue
        if (root / path_of(module)).is_file():
            judge(model, root, served, manifest, found, merged)
    if merged:
        found.overlay = "another version" if any(f.version for f in merged.values()) else "applied"
        found.fix = "wheel" if is_fork(root) else "patch"
    if served:
        found.fix = "plugin"
    if (root / MIXIN).is_file():
        since = (root / MIXIN).stat().st_ctime
    if since is not None:
        found.warnings += warnings(since, cache_dir)
    found.warnings += [text for name, text in BESIDE.items() if (root / name).is_dir()]
    for path, known in table().runners.items() if found.fix else ():
        if (sha := sha256(root / path)) and sha not in known:
            text = "is not from a release that vllm-deepstack knows: the fixes are not tested with"
            found.warnings.append(f"{root / path} {text} this model runner")
    return found


def judge(
    model: str,
    root: Path,
    served: Mapping[str, File],
    manifest: Mapping[str, Any],
    found: Status,
    merged: dict[str, File],
) -> None:
    """One that the vLLM has; adds to `merged` what has replaced its files, by their paths."""
    states: dict[str, str] = {}
    there, unknown = set[str](), []
    for path in concerning(model):
        sha = sha256(root / path)
        file = table().merged.get(sha) or table().earlier.get(sha)
        ours = sha and manifest.get("files", {}).get(path) == sha
        put_aside = root / STATE / "originals" / path
        # Of a release's file, it is what another version makes of it.
        if not file and ours and sha256(put_aside) not in table().files[path]:
            release = releases.known(manifest["release"])
            file = table().files[path][release.sources.get(path, NONE)]
            found.warn(f"{root / path} was merged from a file that is from no release: not tested")
        if file:
            merged[path] = file
        if file and path not in served and (missing := lacking(root, file, served)):
            unknown.append(f"{root / path} needs {missing[0]}, which is not as it was merged")
        elif file := served.get(path) or file:
            states |= dict.fromkeys(file.fixes.get(model, ()), FIXED)
            if file.version:
                there |= {*file.left.get(model, ())}
            else:
                states |= dict.fromkeys(file.left.get(model, ()), LEFT)
        elif known := table().files[path].get(sha):
            there |= {*known.fixes.get(model, ()), *known.left.get(model, ())}
        else:
            unknown.append(f"{root / path} {why_unknown(root, root / path)}")
    if unknown:
        found.unknown[model] = unknown
        return
    states |= dict.fromkeys(there, PRESENT)
    found.models[model] = {name: states[name] for name in table().defects if name in states}
    for name, state in found.models[model].items():
        if state == LEFT:
            found.warn(f"{model}: {name} is as released here: {table().instead[name]}")


def is_fork(root: Path) -> bool:
    """Whether a vLLM's version is one of the fork's wheels: 0.22.1+deepstack.2."""
    version = version_of(root)
    return version is not None and (version.local or "").startswith("deepstack")
