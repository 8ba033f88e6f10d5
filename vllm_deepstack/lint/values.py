"""What an expression may be: which state it aliases, what it is computed from, and whether it is None."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .classes import Class, Method

WHOLE, LEVEL, ROWS, PART = range(4)
"""How much of a tensor an alias has: all; one of several, in a loop over all of them; the first
rows; or another part, which says nothing about the rest."""
UNKNOWN: Any = object()


@dataclass(frozen=True)
class Place:
    """A line of a method."""

    method: Method
    line: int


@dataclass(eq=False)
class Instance:
    """The model, or an object of a class in the same file that it makes."""

    cls: Class
    arguments: list[Value] = field(default_factory=list)
    keywords: dict[str, Value] = field(default_factory=dict)
    in_tower: bool = False
    path: str = ""
    initial: dict[Cell, Value] | None = None
    """What `__init__` leaves in its attributes."""


class Cell(NamedTuple):
    """An attribute."""

    owner: Instance
    name: str

    def __str__(self) -> str:
        return f"{self.owner.path}.{self.name}" if self.owner.path else self.name


ARGUMENTS = Cell(Instance(None), "")  # type: ignore[arg-type]
"""Stands for what a step gives to `embed_input_ids` or `forward`."""


class Ref(NamedTuple):
    cell: Cell
    extent: int
    bound: object
    """Since when the attribute has been bound to it."""


class Made(NamedTuple):
    """Where a tensor is made."""

    place: Place
    on_meta: bool


@dataclass(frozen=True)
class Value:
    refs: frozenset[Ref] = frozenset()
    data: frozenset[Cell] = frozenset()
    """Whose contents it is computed from."""
    deps: frozenset[Cell] = frozenset()
    """What it depends on at all: sizes, too."""
    unless: frozenset[Cell] = frozenset()
    """What decides whether it is None, or left out."""
    made: frozenset[Made] = frozenset()
    none: bool = False
    some: bool = True
    tensor: bool = False
    listed: bool = False
    registered: bool = False
    optional: bool = False
    """Of an argument that some steps leave out."""
    const: Any = UNKNOWN
    holds: Instance | None = None
    method: tuple[Method | ast.Lambda, Instance | None] | None = None
    items: tuple[Value, ...] | None = None
    each: Value | None = None

    @property
    def cells(self) -> frozenset[Cell]:
        return self.data | {ref.cell for ref in self.refs}

    def part(self, extent: int) -> Value:
        """One element or slice of it."""
        refs = frozenset(ref._replace(extent=max(ref.extent, extent)) for ref in self.refs)
        return replace(
            self, refs=refs, none=False, some=True, const=UNKNOWN, listed=False, holds=None,
            items=None, each=None, optional=False,
        )  # fmt: skip

    def element(self) -> Value:
        if self.each:
            return self.each
        if self.items:
            return join(*self.items)
        return self.part(LEVEL)

    def computed(self) -> Value:
        """From its contents, in storage of its own."""
        return Value(data=self.cells, deps=self.deps, tensor=self.tensor, unless=self.unless)

    def known(self) -> Value:
        """Where a condition has shown that it is there."""
        return replace(self, none=False, some=True, optional=False, unless=frozenset())


NONE = Value(none=True, some=False, const=None)


def union(values: Iterable[Value]) -> Value:
    """Made of all of them."""
    values = list(values)

    def of(name: str) -> frozenset[Any]:
        return frozenset().union(*(getattr(value, name) for value in values))

    return Value(
        of("refs"), of("data"), of("deps"), of("unless"), of("made"),
        tensor=any(v.tensor for v in values),
        registered=any(v.registered for v in values),
    )  # fmt: skip


def join(*values: Value) -> Value:
    """One of them, by the path that was taken."""
    first = values[0]
    if all(value == first for value in values):
        return first
    some = [v for v in values if v.some] or [first]
    sizes = {len(v.items) if v.items else None for v in some}
    items = None
    if len(sizes) == 1 and None not in sizes:
        items = tuple(join(*several) for several in zip(*(v.items or () for v in some)))
    return replace(
        union(values),
        none=any(v.none for v in values),
        some=any(v.some for v in values),
        listed=any(v.listed for v in values),
        optional=any(v.optional for v in values),
        holds=next((v.holds for v in some if v.holds), None),
        method=some[0].method,
        items=items,
        each=next((v.each for v in some if v.each), None),
    )
