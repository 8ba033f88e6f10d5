"""The tables of docs/defects.md: release × defect, model × defect, from each release's own code.

python -m tests.overlay.table
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import groupby
from pathlib import Path

from vllm_deepstack import package_index, releases
from vllm_deepstack.patch.defects import DEFECTS
from vllm_deepstack.patch.status import LEFT, Status, status
from vllm_deepstack.patch.tree import Tree

Statuses = dict[str, tuple[Status, Status]]
MARKS = {"present": "✗", "latent": "·"}


def statuses(trees: dict[str, Path]) -> Statuses:
    """Before and after the overlay, by release; the trees are written to."""
    found = {}
    for version, tree in trees.items():
        before = status(tree)
        Tree(tree).apply()
        found[version] = before, status(tree)
    return found


def table(found: Statuses) -> str:
    """Neighbors alike share a row."""
    rows = [
        (version, [*marks(before.defects), ", ".join(present(after, LEFT)) or "none"])
        for version, (before, after) in found.items()
    ]
    lines = []
    for cells, group in groupby(rows, key=lambda row: row[1]):
        versions = [version for version, _ in group]
        lines.append([" to ".join(dict.fromkeys([versions[0], versions[-1]])), *cells])
    return markdown("vLLM", lines, "with the fork")


def models_table(found: Statuses) -> str:
    """Of every model, what any release has."""
    worst: dict[str, dict[str, str]] = {}
    for before, _ in found.values():
        for model, states in before.models.items():
            of = worst.setdefault(model, {})
            for name, state in states.items():
                if state in MARKS:
                    of[name] = state
    return markdown("model", [[model, *marks(states)] for model, states in worst.items()])


def markdown(corner: str, lines: list[list[str]], *last: str) -> str:
    head = [[corner, *DEFECTS, *last], ["---", *[":-:"] * (len(DEFECTS) + len(last))]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def present(found: Status, *also: str) -> list[str]:
    return [name for name, state in found.defects.items() if state in ("present", *also)]


def marks(states: dict[str, str]) -> list[str]:
    return [MARKS.get(states.get(name, ""), "") for name in DEFECTS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for version, release in releases.releases().items():
            kept = releases.ROOT / "build" / "sources" / str(version)
            package_index.fetch_sources(release, kept)
            trees[str(version)] = Path(shutil.copytree(kept, Path(folder) / str(version)))
        found = statuses(trees)
        print(table(found), models_table(found), sep="\n", end="")
