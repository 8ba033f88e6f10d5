"""What an expression may be: which state it aliases, and what it is computed from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .classes import Class, Method

WHOLE, LEVEL, ROWS, PART = range(4)
"""How much of a tensor an alias has: all; one of several, in a loop over all of them; the first
rows; another part, which says nothing about the rest."""
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
    given: tuple[list[Value], dict[str, Value]] = field(default_factory=lambda: ([], {}))
    in_tower: bool = False
    path: str = ""
    initial: dict[Cell, Value] | None = None
    """What `__init__` leaves in its attributes."""


class Cell(NamedTuple):
    """An attribute."""

    owner: Instance
    name: str

    def __str__(self) -> str:
        return f"{self.owner.path}.{self.name}".lstrip(".")


ARGUMENTS = Cell(Instance(None), "")  # type: ignore[arg-type]
"""Stands for what a step gives to `embed_input_ids` or `forward`."""


class Ref(NamedTuple):
    cell: Cell
    extent: int
    bound: object  # since when: another object for each time that the attribute is bound


class Made(NamedTuple):
    """Where a tensor is made."""

    place: Place
    on_meta: bool


@dataclass(frozen=True)
class Value:
    refs: frozenset[Ref] = frozenset()
    data: frozenset[Cell] = frozenset()  # whose contents it is computed from
    deps: frozenset[Cell] = frozenset()  # what it depends on at all, sizes included
    unless: frozenset[Cell] = frozenset()  # what decides whether it is None, or left out
    made: frozenset[Made] = frozenset()
    none: bool = False
    some: bool = True
    tensor: bool = False
    registered: bool = False
    const: Any = UNKNOWN
    holds: Instance | None = None
    method: tuple[Method, Instance | None] | None = None
    items: tuple[Value, ...] | None = None
    each: Value | None = None

    @property
    def cells(self) -> frozenset[Cell]:
        return self.data | {ref.cell for ref in self.refs}

    def part(self, extent: int) -> Value:
        refs = frozenset(ref._replace(extent=max(ref.extent, extent)) for ref in self.refs)
        return union([replace(self, refs=refs)])

    def element(self) -> Value:
        return self.each or (join(*self.items) if self.items else self.part(LEVEL))

    def computed(self) -> Value:
        """From its contents, in storage of its own."""
        return Value(data=self.cells, deps=self.deps, tensor=self.tensor, unless=self.unless)


NONE = Value(none=True, some=False, const=None)


def union(values: Iterable[Value], **others: Any) -> Value:
    """Made of all of them."""
    values = list(values)
    names = ("refs", "data", "deps", "unless", "made")
    sets = [frozenset().union(*(getattr(v, name) for v in values)) for name in names]
    tensor, registered = any(v.tensor for v in values), any(v.registered for v in values)
    return replace(Value(*sets, tensor=tensor, registered=registered), **others)  # type: ignore


def join(*values: Value) -> Value:
    """One of them, by the path that was taken."""
    if all(value == values[0] for value in values):
        return values[0]
    some = [v for v in values if v.some] or [*values]
    same = len({len(v.items or ()) for v in some}) == 1 and some[0].items
    either = {name: any(getattr(v, name) for v in values) for name in ("none", "some")}
    return union(
        values,
        **either,
        holds=next((v.holds for v in some if v.holds), None),
        method=some[0].method,
        items=tuple(join(*several) for several in zip(*(v.items or () for v in some)))
        if same
        else None,
        each=next((v.each for v in some if v.each), None),
    )
