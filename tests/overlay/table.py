"""The tables of docs/defects.md: release × defect, model × defect, from each release's own code.

python -m tests.overlay.table
"""

from __future__ import annotations

import shutil
import tempfile
from itertools import groupby
from pathlib import Path

from vllm_deepstack import package_index, releases
from vllm_deepstack.patch.tree import Tree

from .defects import DEFECTS, judged, worst

States = dict[str, dict[str, str]]
"""By model and defect."""
Judgements = dict[str, tuple[States, States]]
MARKS = {"present": "✗", "latent": "·"}


def judgements(trees: dict[str, Path]) -> Judgements:
    """Before and after the overlay, by release; the trees are written to."""
    found = {}
    for version, tree in trees.items():
        before = judged(tree)
        Tree(tree).apply()
        found[version] = before, judged(tree)
    return found


def table(found: Judgements) -> str:
    """Neighbors alike share a row."""
    rows = [
        (version, [*marks(worst(before)), ", ".join(present(worst(after))) or "none"])
        for version, (before, after) in found.items()
    ]
    lines = []
    for cells, group in groupby(rows, key=lambda row: row[1]):
        versions = [version for version, _ in group]
        lines.append([" to ".join(dict.fromkeys([versions[0], versions[-1]])), *cells])
    return markdown("vLLM", lines, "with the fork")


def models_table(found: Judgements) -> str:
    """Of every model, what any release has."""
    ever: States = {}
    for before, _ in found.values():
        for model, states in before.items():
            of = ever.setdefault(model, {})
            of |= {name: state for name, state in states.items() if state in MARKS}
    return markdown("model", [[model, *marks(states)] for model, states in ever.items()])


def markdown(corner: str, lines: list[list[str]], *last: str) -> str:
    head = [[corner, *DEFECTS, *last], ["---", *[":-:"] * (len(DEFECTS) + len(last))]]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def present(states: dict[str, str]) -> list[str]:
    return [name for name, state in states.items() if state == "present"]


def marks(states: dict[str, str]) -> list[str]:
    return [MARKS.get(states.get(name, ""), "") for name in DEFECTS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for version, release in releases.releases().items():
            kept = releases.ROOT / "build" / "sources" / str(version)
            package_index.fetch_sources(release, kept)
            trees[str(version)] = Path(shutil.copytree(kept, Path(folder) / str(version)))
        found = judgements(trees)
        print(table(found), models_table(found), sep="\n", end="")
