"""The table release × defect, as Markdown: each release before and after the overlay.

python -m tests.overlay.table
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import groupby
from pathlib import Path

from tools import releases
from tools.overlay.defects import DEFECTS
from tools.overlay.status import Status, status
from tools.overlay.tree import Tree

Statuses = dict[str, tuple[Status, Status]]


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
        (version, [*marks(before), ", ".join(present(after)) or "none"])
        for version, (before, after) in found.items()
    ]
    lines = [["vLLM", *DEFECTS, "with the fork"], ["---", *[":-:"] * (len(DEFECTS) + 1)]]
    for cells, group in groupby(rows, key=lambda row: row[1]):
        versions = [version for version, _ in group]
        lines.append([" to ".join(dict.fromkeys([versions[0], versions[-1]])), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def present(found: Status) -> list[str]:
    return [name for name, state in found.defects.items() if state == "present"]


def marks(found: Status) -> list[str]:
    return ["✗" if name in present(found) else "" for name in DEFECTS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for version, release in releases.releases().items():
            kept = releases.ROOT / "build" / "sources" / str(version)
            releases.fetch_sources(release, kept)
            trees[str(version)] = Path(shutil.copytree(kept, Path(folder) / str(version)))
        print(table(statuses(trees)), end="")
