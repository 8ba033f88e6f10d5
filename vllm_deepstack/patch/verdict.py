"""What the plugin does with an installed vLLM: which files it serves at import, or why none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from .. import releases
from ..cli import UserError
from .defects import DEFECTS, KINDS
from .status import CLEAN, Status, is_fork, status
from .tree import Tree, UnknownReleaseError


@dataclass(frozen=True)
class Verdict:
    text: str
    """What is fixed, or why nothing is."""
    warning: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    """The merged files by their paths, `vllm/…/qwen3_vl.py`."""


def verdict(root: Path) -> Verdict:
    """Reads the vLLM in `root`, which holds `vllm/`, and merges. Writes nothing."""
    try:
        return _verdict(root)
    except UserError as error:
        return Verdict(f"{error}; vLLM runs as it is installed", warning=True)


def _verdict(root: Path) -> Verdict:
    tested = True
    try:
        tree = Tree(root)
    except UnknownReleaseError:
        tree, tested = Tree(root, untested=True), False
    name = f"vLLM {tree.release.version}"
    files = {change.path: change.after for change in tree.changes()}
    if not files:
        how = "a wheel that has the fixes" if is_fork(root) else "patched by `vllm-deepstack apply`"
        return Verdict(f"{name} is {how}: nothing to do")
    if tested:
        models, defects = fixed(root, tree.release.version)
    else:
        check_replaced(tree)
        models, defects = newly_fixed(root, files)
    text = f"{name}, DeepStack fixes for {', '.join(models)} ({', '.join(defects)})"
    if tested:
        return Verdict(text, files=files)
    return Verdict(
        f"{text}; they fit this release, and were not tested with it: look for a newer "
        "vllm-deepstack, and compare with `vllm-deepstack check`",
        warning=True,
        files=files,
    )


def fixed(root: Path, version: Version) -> tuple[list[str], list[str]]:
    """The models, and the defects, that the fork fixes in a known release: by the table that tests
    hold against each release's code, since reading it again takes as long as the merge."""
    pairs = [
        (model, name)
        for name, defect in DEFECTS.items()
        for model, (_, released) in defect.models.items()
        if not defect.latent
        and released.contains(version)
        and defect.left(model, version) is None
        and (root / KINDS[model].file).is_file()
    ]
    return in_order(pairs)


def check_replaced(tree: Tree) -> None:
    """Raises UserError if a newer release has changed what the fork replaces as a whole."""
    for path, expected in releases.replaced().items():
        found = tree.replaced(path)
        for name in sorted({*expected, *found}):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"{path}: {name}: not as in vLLM {max(releases.releases())}, for which the fix "
                    f"was written (vLLM {tree.release.version})"
                )


def newly_fixed(root: Path, files: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """As `fixed`, from the code before and after.

    Raises:
        UserError: a defect is left, or it cannot be told.
    """
    before, after = status(root), status(root, served=files)
    if after.code != CLEAN:
        left = after.problem or "defects are left: " + ", ".join(present(after))
        raise UserError(f"vLLM {before.release} is newer than this vllm-deepstack: {left}")
    pairs = [
        (model, name)
        for model, states in before.models.items()
        for name, state in states.items()
        if state == "present"
    ]
    return in_order(pairs)


def present(found: Status) -> list[str]:
    return [name for name, state in found.defects.items() if state == "present"]


def in_order(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The models, and the defects, of pairs of both."""
    models, defects = ({pair[i] for pair in pairs} for i in (0, 1))
    return [m for m in KINDS if m in models], [d for d in DEFECTS if d in defects]
