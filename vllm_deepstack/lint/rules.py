"""DS001 to DS007."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .classes import EMBED, FORWARD, Class, Method
from .state import BIND, CLEAR, GONE, NEW, OLD, ROWS, Cell, Made, Place, Reader, State, Write


@dataclass(frozen=True)
class Rule:
    code: str
    name: str
    title: str
    why: str
    find: Callable[[Model, Cell], Place | None]


@dataclass(frozen=True)
class Finding:
    code: str
    file: Path
    line: int
    cls: str
    attribute: str
    writer: Place
    reader: Place
    also: tuple[str, ...] = ()
    """Classes that inherit it."""
    inherited: bool = False
    """From a file that was not asked for."""

    @property
    def rule(self) -> Rule:
        return RULES[self.code]

    @property
    def message(self) -> str:
        return f"{self.cls}.{self.attribute}: {self.rule.why}"


class Model:
    """What a class stages, and what it does with it."""

    def __init__(self, cls: Class):
        self.cls, self.reader = cls, Reader(cls)
        self.embedded = self.reader.step(1, EMBED, {})
        self.staged: dict[Cell, Write] = {}
        for write in self.reader.writes[1]:
            bound = write.kind == BIND and not (write.value.tensor or write.value.made)
            if write.kind != CLEAR and write.value.some and not bound:
                self.staged.setdefault(write.cell, write)
        heap = (self.reader.merge(State(), self.embedded) or self.embedded).heap
        self.ran = self.reader.step(2, FORWARD, heap) if self.staged else None

    def made(self, cell: Cell) -> frozenset[Made]:
        """Where `__init__` makes its tensors: the storage that a captured graph keeps reading."""
        value = self.reader.initial(cell)
        return value.made if value else frozenset()

    def binds(self, cell: Cell) -> list[Write]:
        writes = self.reader.writes[1] + self.reader.writes[2]
        return [w for w in writes if w.cell == cell and w.kind == BIND and w.value.some]

    @cached_property
    def listed(self) -> set[str]:
        """What a `named_buffers` of its own names, also through properties."""
        found, left = set[str](), {"named_buffers"}
        while left:
            found.add(name := left.pop())
            member = self.cls.member(name)
            node = member.node if isinstance(member, Method) else member or ast.Pass()
            left |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} - found
        return found

    def withheld(self, cell: Cell) -> bool:
        """Whether what a step has left decides if the decoder gets it."""
        unless = frozenset[Cell]().union(*(v.unless for _, v, _ in self.reader.handed[cell]))
        return any(not w.value.made for other in unless - {cell} for w in self.binds(other))


def none_or_tensor(model: Model, cell: Cell) -> Place | None:
    if model.withheld(cell):
        return model.reader.handed[cell][0][0]
    value = model.reader.initial(cell)
    absent = cell in model.reader.defaulted if value is None else not value.some
    return model.staged[cell] if absent else None


def outlives(model: Model, cell: Cell) -> Place | None:
    if OLD not in model.embedded.marks.get(cell, {OLD}) or model.withheld(cell):
        return None
    if model.ran and model.ran.marks.get(cell) == {GONE} and not model.binds(cell):
        return None  # the graph has the clearing in it
    clears = [w for w in model.reader.writes[2] if w.cell == cell]
    return (clears or [model.staged[cell]])[0]


def rebound(model: Model, cell: Cell) -> Place | None:
    return next(iter(model.binds(cell)), None) if model.made(cell) else None


def unregistered(model: Model, cell: Cell) -> Place | None:
    value = model.reader.initial(cell)
    if not (value and value.made) or value.registered or cell.name in model.listed:
        return None
    if model.embedded.marks.get(cell) == {NEW}:
        return None  # every step writes the rows that it reads
    return min((made.place for made in value.made), key=lambda place: place.line)


def from_row_0(model: Model, cell: Cell) -> Place | None:
    """Overlap is for expert parallelism."""
    names = " ".join(cls.name.lower() for cls in model.cls.lineage)
    for place, value, on in model.reader.handed[cell]:
        experts = "FusedMoE(" in on.cls.module.text if on else False
        rows = any(ref.cell == cell and ref.extent == ROWS for ref in value.refs)
        if rows and (experts or "moe" in names or "mixtureofexperts" in names):
            return place
    return None


def on_meta(model: Model, cell: Cell) -> Place | None:
    if none_or_tensor(model, cell) or any("is_meta" in c.module.text for c in model.cls.lineage):
        return None  # nothing is read before it is staged, or it looks
    return next((made.place for made in model.made(cell) if made.on_meta), None)


def wiped(model: Model, cell: Cell) -> Place | None:
    return model.reader.wiped.get(cell)


TABLE = """
None at some steps, a tensor at others
forward is compiled or captured while it is None, and later tensors are ignored
not cleared when a graph is replayed
a replayed graph does not clear it, so that later steps read what this one staged
storage rebound after capture
it is bound to new storage, and a captured graph goes on reading the old
state outside named_buffers
it is in no named_buffers(): sleep(level=2) loses it, and rows are read unwritten
rows read from 0 under micro-batches
it is read from row 0: with dual-batch overlap the second half reads the first's rows
made on the meta device, and read
it is made with the tower, which is on the meta device where its limits are 0
wiped before it is read
forward wipes what this step staged before the decoder gets it
""".strip().splitlines()
FINDERS = {
    "none-or-tensor": none_or_tensor,
    "stale-staging": outlives,
    "rebound-storage": rebound,
    "unregistered-state": unregistered,
    "rows-from-zero": from_row_0,
    "meta-device-state": on_meta,
    "wiped-before-read": wiped,
}
RULES = {
    (code := f"DS{i:03}"): Rule(code, name, TABLE[2 * i - 2], TABLE[2 * i - 1], find)
    for i, (name, find) in enumerate(FINDERS.items(), 1)
}


def findings(cls: Class) -> Iterator[Finding]:
    model = Model(cls)
    for cell in (cell for cell in model.staged if cell in model.reader.handed):
        for rule in RULES.values():
            if place := rule.find(model, cell):
                owner, reader = place.method.owner, model.reader.handed[cell][0][0]
                name = owner.name if owner in cls.lineage else cls.name
                where = place.method.file, place.line
                yield Finding(rule.code, *where, name, str(cell), model.staged[cell], reader)
