"""What a class stages: what `embed_input_ids` writes and `forward` hands to a submodule."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from .classes import EMBED, FORWARD, INIT, Class, Method, own_attribute

IN_PLACE = {"copy_", "zero_", "fill_", "index_copy_", "index_fill_", "index_put_", "scatter_"}
IN_PLACE |= {"masked_scatter_", "masked_fill_", "add_"}
MAKES_TENSORS = {"zeros", "empty", "ones", "full", "zeros_like", "empty_like", "new_zeros", "pad"}
MAKES_TENSORS |= {
    "new_empty",
    "stack",
    "cat",
    "isin",
    "to",
    "clone",
    "IntermediateTensors",
    "where",
}
KEEPS = {"register_buffer", "named_buffers"}


@dataclass(frozen=True)
class Place:
    """A line of a method."""

    method: Method
    line: int


@dataclass(frozen=True)
class Write(Place):
    attribute: str
    value: ast.expr | None
    """What is bound; None: written in place."""
    zeroed: bool = False
    """Written in place, with nothing."""

    @property
    def none(self) -> bool:
        return isinstance(self.value, ast.Constant) and self.value.value is None

    @property
    def makes_tensors(self) -> bool:
        return self.value is not None and any(
            called(part) in MAKES_TENSORS for part in ast.walk(self.value)
        )


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def root_attribute(node: ast.AST) -> str | None:
    """`name` of self.name[0][:n]."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return own_attribute(node)


@cache
def writes(method: Method) -> tuple[Write, ...]:
    """To attributes of `self`, also through a local name for a part of one."""
    return tuple(_writes(method))


def _writes(method: Method) -> Iterator[Write]:
    alias: dict[str, str] = {}
    for node in ast.walk(method.node):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Subscript) and (name := root_attribute(node.value)):
                alias[node.targets[0].id] = name
        elif isinstance(node, (ast.For, ast.comprehension)):
            parts = [part for part in ast.walk(node.iter) if own_attribute(part)]
            for target in ast.walk(node.target):
                if isinstance(target, ast.Name) and len(parts) == 1:
                    alias[target.id] = own_attribute(parts[0]) or ""

    def place(target: ast.expr) -> str | None:
        base: ast.expr = target
        while isinstance(base, ast.Subscript):
            base = base.value
        return alias.get(base.id) if isinstance(base, ast.Name) else own_attribute(base)

    for node in ast.walk(method.node):
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            targets, value = [node.target], node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in IN_PLACE
            and (name := place(node.func.value))
        ):
            yield Write(method, node.lineno, name, None, node.func.attr == "zero_")
        elif called(node) == "register_buffer" and isinstance(node, ast.Call):
            first, tensor = [*node.args, *[keyword.value for keyword in node.keywords]][:2]
            if isinstance(first, ast.Constant):
                yield Write(method, node.lineno, str(first.value), tensor)
        for target in targets:
            name = place(target)
            if name and isinstance(target, ast.Subscript):
                yield Write(method, target.lineno, name, None)
            elif name and not isinstance(target, ast.Name):
                yield Write(method, target.lineno, name, value)


def is_parameter(method: Method, name: str) -> bool:
    arguments = method.node.args
    return name in {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}


class State:
    """Of a class, what is written where, and what reaches a submodule."""

    def __init__(self, cls: Class):
        self.cls = cls
        self.embedding = cls.reach(EMBED)

    @cached_property
    def running(self) -> list[Method]:
        return self.cls.reach(FORWARD)

    @cached_property
    def making(self) -> list[Method]:
        """The `__init__`s that run: its own, and by `super()` those of its bases."""
        found = []
        method = self.cls.method(INIT)
        while method:
            found.append(method)
            calls_super = any(
                isinstance(part, ast.Attribute)
                and part.attr == INIT
                and isinstance(part.value, ast.Call)
                for part in ast.walk(method.node)
            )
            method = self.cls.method(INIT, after=method.owner) if calls_super else None
        return found

    def of(self, attribute: str, methods: list[Method]) -> list[Write]:
        return [w for m in methods for w in writes(m) if w.attribute == attribute]

    @cached_property
    def step(self) -> list[Method]:
        return list(dict.fromkeys([*self.embedding, *self.running]))

    @cached_property
    def cleared(self) -> set[str]:
        """Plain attributes that some step sets to `None`, 0 or the like."""
        return {
            w.attribute
            for m in self.step
            for w in writes(m)
            if isinstance(w.value, ast.Constant)
            and not w.value.value
            and w.attribute not in self.cls.setters
        }

    def on_state(self, test: ast.AST) -> bool:
        """Whether a condition goes by what a step has left."""
        for part in ast.walk(test):
            if (own_attribute(part) or "") in self.cleared:
                return True
            if isinstance(part, ast.Constant) and part.value in self.cleared:  # getattr's
                return True
        return False

    @cached_property
    def returned(self) -> dict[Method, set[str]]:
        """What methods that `forward` reaches return, or attributes that it is made of."""
        found: dict[Method, set[str]] = {m: set() for m in self.running}
        for _ in range(3):  # through as many calls
            for method in self.running:
                values = [n for n in ast.walk(method.node) if isinstance(n, ast.Return) and n.value]
                names = self.names(method, found)
                for node in values:
                    assert node.value
                    found[method] |= self.carried(method, node.value, names, found)
        return found

    def names(self, method: Method, returned: dict[Method, set[str]]) -> dict[str, set[str]]:
        """What local names carry."""
        names: dict[str, set[str]] = {}
        for _ in range(2):  # a loop's second turn
            for node in ast.walk(method.node):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    value = node.value
                elif isinstance(node, ast.Call) and called(node) == "update":
                    assert isinstance(node.func, ast.Attribute)
                    targets, value = [node.func.value], node
                else:
                    continue
                carried = self.carried(method, value, names, returned)
                for target in targets:
                    while isinstance(target, ast.Subscript):
                        target = target.value
                    if isinstance(target, ast.Name):
                        names.setdefault(target.id, set()).update(carried)
        return names

    def carried(
        self,
        method: Method,
        value: ast.expr,
        names: dict[str, set[str]],
        returned: dict[Method, set[str]],
    ) -> set[str]:
        found: set[str] = set()
        for part in ast.walk(value):
            name = own_attribute(part)
            if isinstance(part, ast.Call):
                for target in self.cls.called(method, part.func):
                    found |= returned.get(target, set())
            elif name and isinstance(getattr(part, "ctx", None), ast.Load):
                found.add(name)
            elif isinstance(part, ast.Name):
                found |= names.get(part.id, set())
        return found

    @cached_property
    def handed_on(self) -> dict[str, Place]:
        """Attributes that reach a call of a submodule, and where."""
        found: dict[str, Place] = {}
        for method in self.running:
            names = self.names(method, self.returned)
            for node in ast.walk(method.node):
                if not isinstance(node, ast.Call) or not self.is_submodule(node.func):
                    continue
                for value in [*node.args, *(keyword.value for keyword in node.keywords)]:
                    for name in self.carried(method, value, names, self.returned):
                        found.setdefault(name, Place(method, node.lineno))
        return found

    def is_submodule(self, function: ast.expr) -> bool:
        """`self.language_model(…)`, `self.language_model.model(…)`, and no method of its own."""
        while isinstance(function, ast.Attribute):
            if name := own_attribute(function):
                return self.cls.method(name) is None
            function = function.value
        return False

    @cached_property
    def staged(self) -> dict[str, Write]:
        """Attributes with tensors that `embed_input_ids` writes and `forward` hands on, and the
        first place that writes one."""
        found: dict[str, Write] = {}
        for write in (w for m in self.embedding for w in writes(m) if not w.none):
            name = write.attribute
            every = self.of(name, [*self.step, *self.making])
            if name not in found and any(w.value is None or w.makes_tensors for w in every):
                found[name] = write
        return {name: write for name, write in found.items() if name in self.handed_on}

    def renewed(self, attribute: str) -> bool:
        """Whether `embed_input_ids` writes it at every step, before its first way out."""
        method = self.cls.method(EMBED)
        return method is not None and bool(self._renews(method, method.node.body, attribute))

    def _renews(self, method: Method, body: list[ast.stmt], attribute: str) -> bool | None:
        """True: it does; False: there is a way out before; None: neither."""
        for statement in body:
            if isinstance(statement, ast.If):
                if self.always(method, statement.test):
                    inner = self._renews(method, statement.body, attribute)
                elif any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                    return False
                else:
                    continue
            elif isinstance(statement, ast.With):
                inner = self._renews(method, statement.body, attribute)
            else:
                inner = self.reaches_write(method, statement, attribute) or None
                if inner is None and isinstance(statement, ast.Return):
                    inner = False
            if inner is not None:
                return inner
        return None

    def always(self, method: Method, test: ast.expr) -> bool:
        """`x is not None` of a parameter that every step gives, of an attribute that no step sets
        to None, or of a value computed from them."""
        if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)):
            return False
        if name := own_attribute(test.left):
            return name not in self.cleared
        if (
            isinstance(test.left, ast.Name)
            and method.name != EMBED
            and is_parameter(method, test.left.id)
        ):
            return False  # of a method that may be given what the step has, or None
        arguments = method.node.args
        optional = {a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]}
        optional |= {a.arg for a in arguments.kwonlyargs}
        return isinstance(test.left, ast.Name) and test.left.id not in optional

    def reaches_write(self, method: Method, node: ast.AST, attribute: str) -> bool:
        """Whether a statement writes the attribute, or calls what does."""
        lines = range(getattr(node, "lineno", 0), (getattr(node, "end_lineno", 0) or 0) + 1)
        if any(w.attribute == attribute and w.line in lines for w in writes(method)):
            return True
        for target in self.cls.called(method, node):
            if self._renews(target, target.node.body, attribute):
                return True
            below = [target, *self._below(target)]
            if any(w.none or w.zeroed for w in self.of(attribute, below)):
                return True  # where something is staged
        return False

    def _below(self, method: Method) -> list[Method]:
        seen: dict[Method, None] = {}
        left = [method]
        while left:
            for found in self.cls.called(left[-1], left.pop().node):
                if found not in seen and found.name != INIT:
                    seen[found] = None
                    left.append(found)
        return list(seen)

    def cleared_always(self, attribute: str) -> bool:
        """Whether `forward` writes it in place whatever is staged: then a graph captures that."""
        method = self.cls.method(FORWARD)
        if method is None:
            return False
        return self._clears(method, method.node.body, attribute, frozenset())

    def _clears(
        self, method: Method, body: list[ast.stmt], attribute: str, seen: frozenset[Method]
    ) -> bool:
        for statement in body:
            if isinstance(statement, ast.If):
                if self.on_state(statement.test):
                    if any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                        return False
                    continue
                if self._clears(method, statement.body, attribute, seen):
                    return True
                continue
            if isinstance(statement, (ast.For, ast.With)):
                if self._clears(method, statement.body, attribute, seen):
                    return True
                continue
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            for write in writes(method):
                if write.attribute == attribute and write.line in lines and write.value is None:
                    return True
            for target in self.cls.called(method, statement):
                if target not in seen and self._clears(
                    target, target.node.body, attribute, seen | {target}
                ):
                    return True
        return False
