"""DS001 to DS007."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .classes import Class, Method
from .state import BIND, CLEAR, EMBEDDING, GONE, NEW, OLD, RUNNING, Reader, Write
from .values import ROWS, Cell, Made, Place


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

    @property
    def message(self) -> str:
        return f"{self.cls}.{self.attribute}: {RULES[self.code].why}"


class Model:
    """What a class stages, and what it does with it."""

    def __init__(self, cls: Class):
        self.cls = cls
        self.reader = Reader(cls)
        self.embedded = self.reader.embed()
        self.staged: dict[Cell, Write] = {}
        for write in self.reader.writes[EMBEDDING]:
            bound = write.kind == BIND and not (write.value.tensor or write.value.made)
            if write.kind != CLEAR and write.value.some and not bound:
                self.staged.setdefault(write.cell, write)
        if self.staged:
            self.ran = self.reader.forward(self.embedded)

    def made(self, cell: Cell) -> frozenset[Made]:
        """Where `__init__` makes its tensors: the storage that a captured graph keeps reading."""
        value = self.reader.initial(cell)
        return value.made if value else frozenset()

    def binds(self, cell: Cell) -> list[Write]:
        writes = [*self.reader.writes[EMBEDDING], *self.reader.writes[RUNNING]]
        return [w for w in writes if w.cell == cell and w.kind == BIND and w.value.some]

    @cached_property
    def listed(self) -> set[str]:
        """What a `named_buffers` of its own names, also through properties."""
        found, left = set[str](), {"named_buffers"}
        while left:
            member = self.cls.member(name := left.pop())
            found.add(name)
            node = member.node if isinstance(member, Method) else member
            left |= (
                {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} - found
                if node
                else set()
            )
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
    reader = model.reader
    if OLD not in model.embedded.marks.get(cell, {OLD}) or model.withheld(cell):
        return None
    if model.ran.marks.get(cell) == {GONE} and not model.binds(cell):
        return None  # the graph has the clearing in it
    clears = [w for w in reader.writes[RUNNING] if w.cell == cell]
    return (clears or [model.staged[cell]])[0]


def rebound(model: Model, cell: Cell) -> Place | None:
    return next(iter(model.binds(cell)), None) if model.made(cell) else None


def unregistered(model: Model, cell: Cell) -> Place | None:
    value = model.reader.initial(cell)
    if value is None or not value.made or value.registered or cell.name in model.listed:
        return None
    if model.embedded.marks.get(cell) == {NEW}:
        return None  # every step writes the rows that it reads
    return min((made.place for made in value.made), key=lambda place: place.line)


def from_row_0(model: Model, cell: Cell) -> Place | None:
    names = " ".join(cls.name.lower() for cls in model.cls.lineage)
    for place, value, on in model.reader.handed[cell]:
        rows = any(ref.cell == cell and ref.extent == ROWS for ref in value.refs)
        experts = "moe" in names or "mixtureofexperts" in names
        if rows and (experts or (on and "FusedMoE(" in on.cls.module.text)):
            return place  # overlap is for expert parallelism
    return None


def on_meta(model: Model, cell: Cell) -> Place | None:
    if none_or_tensor(model, cell) or any("is_meta" in c.module.text for c in model.cls.lineage):
        return None  # nothing is read before it is staged, or it looks
    return next((made.place for made in model.made(cell) if made.on_meta), None)


def wiped(model: Model, cell: Cell) -> Place | None:
    return model.reader.wiped.get(cell)


RULES = {
    rule.code: rule
    for rule in (
        Rule(
            "DS001",
            "none-or-tensor",
            "None at some steps, a tensor at others",
            "forward is compiled or captured while it is None, and later tensors are ignored",
            none_or_tensor,
        ),
        Rule(
            "DS002",
            "stale-staging",
            "not cleared when a graph is replayed",
            "a replayed graph does not clear it, so that later steps read what this one staged",
            outlives,
        ),
        Rule(
            "DS003",
            "rebound-storage",
            "storage rebound after capture",
            "it is bound to new storage, and a captured graph goes on reading the old",
            rebound,
        ),
        Rule(
            "DS004",
            "unregistered-state",
            "state outside named_buffers",
            "it is in no named_buffers(): sleep(level=2) loses it, and rows are read unwritten",
            unregistered,
        ),
        Rule(
            "DS005",
            "rows-from-zero",
            "rows read from 0 under micro-batches",
            "it is read from row 0: with dual-batch overlap the second half reads the first's rows",
            from_row_0,
        ),
        Rule(
            "DS006",
            "meta-device-state",
            "made on the meta device, and read",
            "it is made with the tower, which is on the meta device where its limits are 0",
            on_meta,
        ),
        Rule(
            "DS007",
            "wiped-before-read",
            "wiped before it is read",
            "forward wipes what this step staged before the decoder gets it",
            wiped,
        ),
    )
}


def findings(cls: Class) -> Iterator[Finding]:
    model = Model(cls)
    for cell, writer in model.staged.items():
        if reader := model.reader.handed.get(cell):
            for rule in RULES.values():
                if place := rule.find(model, cell):
                    owner = place.method.owner
                    yield Finding(
                        rule.code, place.method.file, place.line,
                        owner.name if owner in cls.lineage else cls.name, str(cell), writer, reader[0][0],
                    )  # fmt: skip
