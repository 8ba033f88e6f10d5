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
from tools.overlay.status import status
from tools.overlay.tree import Tree


def table(trees: dict[str, Path]) -> str:
    """Of the releases' sources, to which it applies the overlay; neighbors alike share a row."""
    rows = []
    for version, tree in trees.items():
        before = marks(tree)
        Tree(tree).apply()
        rows.append((version, [*before, ", ".join(present(tree)) or "none"]))
    lines = [["vLLM", *DEFECTS, "with the fork"], ["---", *[":-:"] * (len(DEFECTS) + 1)]]
    for cells, group in groupby(rows, key=lambda row: row[1]):
        versions = [version for version, _ in group]
        lines.append([" to ".join(dict.fromkeys([versions[0], versions[-1]])), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def present(tree: Path) -> list[str]:
    return [name for name, state in status(tree).defects.items() if state == "present"]


def marks(tree: Path) -> list[str]:
    return ["✗" if name in present(tree) else "" for name in DEFECTS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for version, release in releases.releases().items():
            kept = releases.ROOT / "build" / "sources" / str(version)
            releases.fetch_sources(release, kept)
            trees[str(version)] = Path(shutil.copytree(kept, Path(folder) / str(version)))
        print(table(trees), end="")
