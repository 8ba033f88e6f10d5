"""DS001 to DS006."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .classes import INIT, Class, own_attribute
from .state import IN_PLACE, KEEPS, Place, State, Write, called, root_attribute


@dataclass(frozen=True)
class Rule:
    code: str
    title: str
    why: str
    find: Callable[[State, str], Iterator[Place]]


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


def allocations(state: State, attribute: str) -> list[Write]:
    """Where `__init__` makes its tensors: the storage that a captured graph keeps reading."""
    return [w for w in state.of(attribute, state.making) if w.makes_tensors]


def none_or_tensor(state: State, attribute: str) -> Iterator[Place]:
    getters = list(returns_none(state, attribute))
    if getters or attribute in state.cls.setters or allocations(state, attribute):
        yield from getters[:1]
        return
    nones = [w for w in state.of(attribute, [*state.step, *state.making]) if w.none]
    if nones and any(not w.none for w in state.of(attribute, state.embedding)):
        yield nones[0]


def returns_none(state: State, attribute: str) -> Iterator[Place]:
    """Where a method that otherwise returns it gives None, by what a step has left."""
    for method in state.running:
        if attribute not in state.returned[method]:
            continue
        for node in ast.walk(method.node):
            if isinstance(node, ast.If) and state.on_state(node.test):
                for part in node.body:
                    if isinstance(part, ast.Return) and is_none(part.value):
                        yield Place(method, part.lineno)


def is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def outlives(state: State, attribute: str) -> Iterator[Place]:
    if state.renewed(attribute) or state.cleared_always(attribute):
        return
    if any(returns_none(state, attribute)):
        return
    clearing = state.of(attribute, state.running)
    yield (clearing or [state.staged[attribute]])[0]


def rebound(state: State, attribute: str) -> Iterator[Place]:
    if not allocations(state, attribute) and attribute not in state.cls.setters:
        return
    for write in state.of(attribute, state.step):
        if write.value is not None and not is_none(write.value):
            yield write
            return


def unregistered(state: State, attribute: str) -> Iterator[Place]:
    made = allocations(state, attribute)
    if not made or state.renewed(attribute):
        return
    setter = state.cls.setters.get(attribute)
    kept = [setter.node] if setter else [m.node for m in state.making]
    for node in kept:
        for part in ast.walk(node):
            if called(part) in KEEPS:
                words = {n.value for n in ast.walk(part) if isinstance(n, ast.Constant)}
                if setter or attribute in words:
                    return
    yield made[0]


def from_row_0(state: State, attribute: str) -> Iterator[Place]:
    names = " ".join(cls.name.lower() for cls in state.cls.lineage)
    if "moe" not in names and "mixtureofexperts" not in names:
        return  # overlap is for expert parallelism
    if not (allocations(state, attribute) or attribute in state.cls.setters):
        return
    for method in state.running:
        cleared = [
            part
            for node in ast.walk(method.node)
            if isinstance(node, ast.Call) and called(node) in IN_PLACE
            for part in ast.walk(node.func)
        ]
        levels = {
            target.id: name
            for node in ast.walk(method.node)
            if isinstance(node, ast.comprehension)
            and (name := next(filter(None, map(own_attribute, ast.walk(node.iter))), None))
            for target in ast.walk(node.target)
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(method.node):
            if (
                isinstance(node, ast.Subscript)
                and node not in cleared
                and isinstance(node.slice, ast.Slice)
                and node.slice.lower is None
                and node.slice.upper is not None
                and attribute in (root_attribute(node), levels.get(getattr(node.value, "id", "")))
                and attribute in state.returned[method] | set(state.handed_on)
            ):
                yield Place(method, node.lineno)
                return


def on_meta(state: State, attribute: str) -> Iterator[Place]:
    if any(none_or_tensor(state, attribute)):
        return  # nothing is read before it is staged
    if any("is_meta" in cls.module.text for cls in state.cls.lineage):
        return
    for write in allocations(state, attribute):
        for node in ast.walk(write.method.node):
            if (
                isinstance(node, ast.With)
                and any("_mark_tower_model" in ast.unparse(item) for item in node.items)
                and node.lineno <= write.line <= (node.end_lineno or 0)
            ):
                yield write
                return


RULES = {
    rule.code: rule
    for rule in (
        Rule(
            "DS001",
            "None at some steps, a tensor at others",
            "forward is compiled or captured while it is None, and later tensors are ignored",
            none_or_tensor,
        ),
        Rule(
            "DS002",
            "not cleared when a graph is replayed",
            "a replayed graph does not clear it, so that later steps read what this one staged",
            outlives,
        ),
        Rule(
            "DS003",
            "storage rebound after capture",
            "it is bound to new storage, and a captured graph goes on reading the old",
            rebound,
        ),
        Rule(
            "DS004",
            "state outside named_buffers",
            "it is in no named_buffers(): sleep(level=2) loses it, and rows are read unwritten",
            unregistered,
        ),
        Rule(
            "DS005",
            "rows read from 0 under micro-batches",
            "it is read from row 0: with dual-batch overlap the second half reads the first's rows",
            from_row_0,
        ),
        Rule(
            "DS006",
            "made on the meta device, and read",
            "it is made with the tower, which is on the meta device where its limits are 0",
            on_meta,
        ),
    )
}


def findings(cls: Class) -> Iterator[Finding]:
    state = State(cls)
    for attribute, writer in state.staged.items():
        for rule in RULES.values():
            for place in rule.find(state, attribute):
                yield Finding(
                    rule.code,
                    place.method.file,
                    place.line,
                    place.method.owner.name if place.method.name != INIT else cls.name,
                    attribute,
                    writer,
                    state.handed_on[attribute],
                )
