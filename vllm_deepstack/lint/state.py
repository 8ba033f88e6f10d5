"""Reads what methods do to attributes: in order, on all paths."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, NamedTuple

from .classes import FORWARD, INIT, Class, Method

MAKING, EMBEDDING, RUNNING = range(3)
BIND, CLEAR, FILL, STAGE = "bind", "clear", "fill", "stage"
OLD, CLEAN, NEW, READ, GONE = "old", "clean", "new", "read", "gone"
"""What an attribute holds: what was there before; nothing; new contents in all rows; what the
decoder has read; nothing, since the decoder read it."""
SIZES = {"size", "shape", "device", "dtype", "numel", "dim", "ndim", "item", "stride"}
VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "expand", "t", "T"}
VIEWS |= {"flatten", "unbind", "chunk", "split", "select", "detach", "data", "values", "items"}
VIEWS |= {"expand_as", "view_as", "get"}
ADDS = {"append", "extend", "update", "setdefault", "insert", "add"}
OVERWRITES = {"copy_", "fill_", "normal_", "uniform_"}
PLAIN = {"range", "len", "isinstance", "hasattr", "int", "bool", "any", "all", "type"}
CONTAINERS = {"dict", "list", "tuple", "sorted", "reversed", "set", "next", "iter", "cast"}
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
    same = (len({len(v.items or ()) for v in some}) == 1 and some[0].items) or None
    either = {name: any(getattr(v, name) for v in values) for name in ("none", "some")}
    return union(
        values,
        **either,
        holds=next((v.holds for v in some if v.holds), None),
        method=some[0].method,
        items=same and tuple(join(*several) for several in zip(*(v.items or () for v in some))),
        each=next((v.each for v in some if v.each), None),
    )


Given = tuple[list[Value], dict[str, Value]]
Cells = frozenset[Cell]


@dataclass(frozen=True)
class Write(Place):
    cell: Cell
    kind: str
    value: Value


@dataclass
class State:
    heap: dict[Cell, Value] = field(default_factory=dict)
    marks: dict[Cell, frozenset[str]] = field(default_factory=dict)
    bound: dict[Cell, object] = field(default_factory=dict)
    names: dict[str, Value] = field(default_factory=dict)

    def copy(self) -> State:
        return State(dict(self.heap), dict(self.marks), dict(self.bound), dict(self.names))


@dataclass
class Frame:
    method: Method
    on: Instance | None
    exits: list[tuple[State, Value, bool]] = field(default_factory=list)
    """The bool: whether it depends on what the step is given."""


class Reader:
    """Of one class."""

    def __init__(self, cls: Class):
        self.root = Instance(cls)
        self.phase, self.in_tower = MAKING, False
        self.state: Any = None  # a State; None: no path leads here
        self.frames: list[Frame] = []
        self.asked: frozenset[Cell] = frozenset()  # by the conditions around a statement
        self.writes: tuple[list[Write], ...] = ([], [], [])
        self.handed: dict[Cell, list[tuple[Place, Value, Instance | None]]] = {}
        self.wipes: dict[Cell, Place] = {}  # the latest
        self.wiped: dict[Cell, Place] = {}  # and then read
        self.recomputed: set[object] = set()  # bindings, to what `forward` has from its arguments
        self.defaulted: set[Cell] = set()

    def step(self, phase: int, name: str, heap: dict[Cell, Value]) -> State:
        """`embed_input_ids` or `forward`, with all that it may be given."""
        self.phase, self.state, method = phase, State(heap), self.root.cls.method(name)
        assert method
        args, step = method.node.args, frozenset([ARGUMENTS])
        optional = [a.arg for a, _ in zip(args.args[::-1], args.defaults)]
        optional += [a.arg for a in args.kwonlyargs]
        names = [a.arg for a in (*args.args[1:], *args.kwonlyargs)]
        given = Value(data=step, deps=step, tensor=True)
        every = {name: replace(given, none=name in optional) for name in names}
        self.call(method, self.root, ([], every))
        return self.state or State()

    def initial(self, cell: Cell) -> Value | None:
        owner = cell.owner
        if owner.initial is None and owner.cls:
            owner.initial, kept = {}, (self.phase, self.state, self.asked, self.in_tower)
            self.phase, self.state, self.asked = MAKING, State(), frozenset()
            self.in_tower = owner.in_tower
            if method := owner.cls.method(INIT):
                self.call(method, owner, owner.given)
            else:  # of a dataclass
                fields = [n.target for n in owner.cls.node.body if isinstance(n, ast.AnnAssign)]
                names = [getattr(f, "id", "") for f in fields]
                values = {**dict(zip(names, owner.given[0])), **owner.given[1]}
                self.state.heap = {Cell(owner, name): v for name, v in values.items()}
            owner.initial = self.state.heap if self.state else {}
            self.phase, self.state, self.asked, self.in_tower = kept
        if owner.initial and cell in owner.initial:
            return owner.initial[cell]
        member = owner.cls and owner.cls.member(cell.name)
        if not isinstance(member, ast.Constant):
            return None
        return NONE if member.value is None else Value(const=member.value)

    def place(self, node: ast.AST) -> Place:
        return Place(self.frames[-1].method, getattr(node, "lineno", 1))

    def load(self, on: Instance, name: str) -> Value:
        cell, member = Cell(on, name), on.cls.member(name)
        if isinstance(member, Method):
            bound = Value(method=(member, on))
            return self.call(member, on, ([], {})) if member.is_a("property") else bound
        held = self.state.heap.get(cell) or self.initial(cell) or Value()
        deps = held.deps | {cell}
        if held.holds or held.refs:
            return replace(held, deps=deps)
        if cell not in self.state.heap:
            held = replace(held, const=UNKNOWN)  # as a step has left it, not as it began
        ref = Ref(cell, WHOLE, self.state.bound.get(cell))
        return replace(held, refs=frozenset([ref]), data=frozenset(), deps=deps, items=None)

    def store(self, on: Instance, name: str, value: Value, node: ast.AST) -> None:
        if setter := on.cls.setter(name):
            self.call(setter, on, ([value], {}))
            return
        if value.holds and not value.holds.path:
            value.holds.path = f"{on.path}.{name}".lstrip(".")
        self.write(BIND, Cell(on, name), value, node)

    def write(self, kind: str, cell: Cell, value: Value, node: ast.AST) -> None:
        place, state, own = self.place(node), self.state, cell in value.cells
        self.writes[self.phase].append(Write(place.method, place.line, cell, kind, value))
        if kind == BIND:
            alias = self.phase == MAKING or (self.phase == RUNNING and value.refs and not own)
            stored = value if alias else replace(value, refs=frozenset(), data=value.cells)
            state.heap[cell] = replace(stored, items=None)
            if not own:
                state.bound[cell] = object()
        if self.phase == MAKING or own or kind == STAGE:
            return
        new = kind != CLEAR and ARGUMENTS in value.data
        if self.phase == RUNNING and kind == BIND:
            if new:
                self.recomputed.add(state.bound[cell])
            if cell in self.asked:
                return  # it grows
        after = NEW if kind == FILL else CLEAN
        before = state.marks.get(cell, {OLD})
        state.marks[cell] = frozenset(GONE if m in (READ, GONE) else after for m in before)
        if self.phase == RUNNING and not new:
            self.wipes[cell] = place

    def change(self, target: Value, kind: str, value: Value, node: ast.AST) -> None:
        """In place."""
        for ref in target.refs:
            partly = ref.extent == PART or ref.cell in value.cells
            if not partly or kind != CLEAR:
                self.write(STAGE if partly else kind, ref.cell, value, node)

    def use(self, value: Value) -> None:
        for cell, _, bound in value.refs if self.phase == RUNNING and self.state else ():
            current = bound is self.state.bound.get(cell) not in self.recomputed
            if current and cell in self.wipes and self.state.marks.get(cell, set()) & {CLEAN, NEW}:
                self.wiped.setdefault(cell, self.wipes[cell])

    def hand_on(self, node: ast.Call, on: Instance | None) -> Value:
        """To a submodule."""
        values, keywords = self.arguments(node)
        every = [*values, *keywords.values()]
        if self.phase == RUNNING:
            for value in every:
                self.use(value)
                new = {ref.cell for ref in value.refs if ref.bound in self.recomputed}
                for cell in value.cells - new:
                    self.handed.setdefault(cell, []).append((self.place(node), value, on))
            if on and (method := on.cls.method(FORWARD)):
                self.call(method, on, (values, keywords))
            self.state.marks |= dict.fromkeys(union(every).cells, frozenset([READ]))
        deps = union(every).deps
        return Value(data=deps & {ARGUMENTS}, deps=deps, tensor=True)

    def merge(self, a: State | None, b: State | None, deps: Cells | None = None) -> State | None:
        """`deps`: of the condition between them."""
        if a is None or b is None:
            return a or b
        found, both = State(), (a, b)
        for cell in {*a.heap, *b.heap}:
            values = [v for s in both if (v := s.heap.get(cell) or self.initial(cell))]
            found.heap[cell] = join(*values)
        config = deps is not None and self.phase == EMBEDDING and ARGUMENTS not in deps
        for cell in {*a.marks, *b.marks}:
            marks = frozenset[str]().union(*(s.marks.get(cell, {OLD}) for s in both))
            # Nothing is there, or it is so at every step.
            found.marks[cell] = marks - {OLD} if config and marks & {CLEAN, NEW} else marks
        for cell in {*a.bound, *b.bound}:
            one, two = a.bound.get(cell), b.bound.get(cell)
            found.bound[cell] = one if one is two else object()
        for name in {*a.names, *b.names}:
            values = [s.names[name] for s in both if name in s.names]
            value = join(*values)
            withheld = value.cells and len({v.some for v in values}) == 2 and deps
            found.names[name] = replace(value, unless=value.unless | (withheld or set()))
        return found

    def branch(self, test: ast.expr, *bodies: Callable[[], Value]) -> Value:
        deps, before, asked = self.ev(test).deps, self.state, self.asked
        values, states = [], []
        for truth, body in zip((True, False), bodies):
            self.state, self.asked = before.copy(), asked | deps
            if all([self.holds(*fact) for fact in facts(test, truth)]):
                values.append(body())
                states.append(self.state)
        left = len(states) == 2 and None in states  # the rest runs where one path has not left
        self.asked = asked | deps if left else asked
        self.state = reduce(partial(self.merge, deps=deps), states)
        return join(*values)

    def holds(self, subject: ast.expr, there: bool, exactly: bool) -> bool:
        """Whether a fact is possible; from here on, it is one."""
        value = self.ev(subject)
        if there and isinstance(subject, ast.Name) and subject.id in self.state.names:
            self.state.names[subject.id] = replace(value, none=False, some=True, unless=frozenset())
        if not there and isinstance(subject, (ast.Name, ast.Attribute, ast.Call)):
            whole = [ref.cell for ref in value.refs if ref.extent == WHOLE]
            self.state.marks |= dict.fromkeys(whole, frozenset())  # there is no such state
        known = value.const is not UNKNOWN and not exactly
        if there:
            return value.some and not (known and not value.const)
        return value.none or not (exactly or (known and value.const))

    def run(self, body: Iterable[ast.stmt]) -> Value:
        for statement in body:
            if self.state is not None:
                self.execute(statement)
        return NONE

    def execute(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                new = self.ev(value)
                for target in targets:
                    self.assign(target, new, node)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.ev(value), node)
            case ast.AugAssign(target=target, value=value):
                before, new = self.ev(target), self.ev(value)
                if before.refs and (before.tensor or before.made):
                    self.change(before, STAGE, new, node)
                elif not isinstance(target, ast.Subscript):
                    self.assign(target, union([before.computed(), new]), node)
            case ast.Return(value=value):
                new = self.ev(value) if value else replace(NONE, unless=self.asked)
                self.frames[-1].exits.append((self.state, new, ARGUMENTS in self.asked))
                self.state = None
            case ast.Raise():
                self.state = None
            case ast.If(test, body, orelse):
                self.branch(test, lambda: self.run(body), lambda: self.run(orelse))
            case ast.For(body=body) | ast.While(body=body):
                over = self.ev(node.iter if isinstance(node, ast.For) else node.test)
                before, asked = self.state.copy(), self.asked
                if isinstance(node, ast.For):
                    self.assign(node.target, over.element(), node)
                self.run(body)
                self.state, self.asked = self.state or before, asked
                if over.none and isinstance(node, ast.For):
                    self.state = self.merge(self.state, before)
            case ast.With(items, body):
                outside = self.in_tower
                for item in items:
                    self.in_tower |= called(item.context_expr) == "_mark_tower_model"
                    if not called(item.context_expr).startswith("_mark_"):  # vLLM's own
                        new = self.ev(item.context_expr)
                        if item.optional_vars:
                            self.assign(item.optional_vars, new, node)
                self.run(body)
                self.in_tower = outside
            case ast.Try(body, handlers, orelse, []):
                start = self.state.copy()
                self.run(body)
                end = self.state
                self.run(orelse)
                ends = [self.state]
                for handler in handlers:
                    self.state = self.merge(start.copy(), end)
                    self.run(handler.body)
                    ends.append(self.state)
                self.state = reduce(self.merge, ends)
            case ast.Try(body, handlers, orelse, after):
                exits, count = self.frames[-1].exits, len(self.frames[-1].exits)
                self.run([ast.Try(body, handlers, orelse, [])])
                left = [*exits[count:], (self.state, None, False)]
                if not any(isinstance(part, ast.Yield) for part in ast.walk(node)):
                    del exits[count:]
                    for self.state, returned, given in left:
                        self.run(after)
                        if self.state and returned:
                            exits.append((self.state, returned, given))
            case ast.Match(subject, cases):
                self.match(self.ev(subject), cases)
            case _:
                for part in ast.iter_child_nodes(node):
                    if isinstance(part, ast.expr):
                        self.ev(part)

    def match(self, subject: Value, cases: list[ast.match_case]) -> None:
        before, ends = self.state, list[State | None]()
        for case in cases:
            self.state = before.copy()
            names = [n for p in ast.walk(case.pattern) if (n := getattr(p, "name", None))]
            self.state.names |= dict.fromkeys(names, subject.part(LEVEL))
            self.run(case.body)
            ends.append(self.state)
        last = cases[-1]
        if not isinstance(last.pattern, ast.MatchAs) or last.pattern.pattern or last.guard:
            ends.append(before)
        self.state = reduce(partial(self.merge, deps=subject.deps), ends)

    def assign(self, target: ast.expr, value: Value, node: ast.AST) -> None:
        match target:
            case ast.Name(id=name):
                self.state.names[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                items = value.items or ()
                for i, part in enumerate(parts):
                    new = items[i] if i < len(items) else value.part(PART)
                    self.assign(part.value if isinstance(part, ast.Starred) else part, new, node)
            case ast.Attribute(value=base, attr=name):
                on = self.ev(base)
                if on.holds:
                    self.store(on.holds, name, value, node)
                for ref in on.refs if name == "data" else ():
                    self.write(BIND, ref.cell, value, node)
            case ast.Subscript(value=base, slice=key):
                on = self.ev(base)
                found, copied = self.index(on, key)
                kind = STAGE if copied else CLEAR if value.const in (0, False) else FILL
                self.change(on if copied else found, kind, value, node)
                if not on.refs:
                    self.add(base, value)

    def add(self, target: ast.expr, value: Value) -> None:
        """To a container that is a local name."""
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and (held := self.state.names.get(target.id)):
            if value.cells or value.tensor:
                value = replace(value, unless=value.unless | self.asked)
            new = union([held, value])
            self.state.names[target.id] = held if held.holds else new

    def arguments(self, node: ast.Call) -> Given:
        values, keywords = [self.ev(part) for part in node.args], dict[str, Value]()
        for keyword in node.keywords:
            name, value = keyword.arg or "**", self.ev(keyword.value)
            keywords[name] = union([keywords[name], value]) if name in keywords else value
        return values, keywords

    def call(self, method: Method, on: Instance | None, given: Given) -> Value:
        values, keywords = given
        if method in [f.method for f in self.frames] or len(self.frames) > 12:
            return union([*values, *keywords.values()]).computed()
        before, asked, frame, args = self.state, self.asked, Frame(method, on), method.node.args
        self.state = before.copy()
        self.frames.append(frame)
        names, bound = [a.arg for a in (*args.posonlyargs, *args.args)], dict(keywords)
        if on is not None and names and not method.is_a("staticmethod"):
            bound[names.pop(0)] = Value(holds=on)
        bound |= dict(zip(names, values))
        defaults = [*zip(names[::-1], args.defaults[::-1])]
        defaults += [(a.arg, d) for a, d in zip(args.kwonlyargs, args.kw_defaults) if d]
        for name, default in defaults:
            bound.setdefault(name, bound["**"] if "**" in bound else self.ev(default))
        if args.kwarg:
            bound[args.kwarg.arg] = union(keywords.values())
        self.state.names = bound
        self.run(method.node.body)
        self.frames.pop()
        ends = [*frame.exits, *([(self.state, NONE, True)] if self.state else [])]
        self.state, self.asked = None, asked
        for state, _, depends in sorted(ends, key=lambda end: not end[2]):
            self.state = self.merge(self.state, state, None if depends else frozenset())
        self.state = self.state or before  # what always raises is for another class to define
        self.state.names = before.names
        return join(*([v for _, v, _ in ends if v is not NONE] or [NONE]))

    def called(self, node: ast.Call) -> Value:
        name, frame, on = called(node), self.frames[-1], Value()
        owner = frame.method.owner
        match node.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"), args=start)):
                names = {ast.unparse(start[0])} if start else {owner.name}
                lineage = frame.on.cls.lineage if frame.on else []
                after = next((cls for cls in lineage if cls.name in names), None)
                method = frame.on.cls.method(name, after) if frame.on and after else None
                if method:
                    return self.call(method, frame.on, self.arguments(node))
                return self.other(node, on)
            case ast.Name() if name not in self.state.names:
                if name in owner.module.classes and (cls := owner.sibling(name)):
                    return Value(holds=Instance(cls, self.arguments(node), self.in_tower))
                if found := self.builtin(node, name):
                    return found
            case ast.Attribute(value=ast.Attribute()) if "embed" in name:
                if self.phase == EMBEDDING:
                    return self.hand_on(node, None)  # `__init__` need not be read for that
        function = self.ev(node.func)
        if function.method:
            return self.call(*function.method, self.arguments(node))
        if isinstance(node.func, ast.Attribute):
            on = self.ev(node.func.value)
            values, keywords = self.arguments(node)
            if on.holds and name.startswith("register_"):
                tensor = {**dict(zip(("", "tensor"), values)), **keywords}.get("tensor", NONE)
                key = self.string(node.args[0] if node.args else node.keywords[0].value)
                new = replace(tensor, registered=name == "register_buffer")
                self.store(on.holds, key, new, node)
                return NONE
            if name in ADDS and not on.refs:
                self.add(node.func.value, union([*values, *keywords.values()]))
                return on
        opaque = on.refs and not (on.made or on.tensor or name in VIEWS or name[-1] == "_")
        if on.holds or function.holds or opaque:
            return self.hand_on(node, function.holds)
        return self.other(node, on)

    def builtin(self, node: ast.Call, name: str) -> Value | None:
        values = [self.ev(a) for a in node.args]
        if name in ("getattr", "setattr") and len(values) > 1 and (on := values[0].holds):
            key = self.string(node.args[1])
            if name == "setattr":
                self.store(on, key, values[2], node)
                return NONE
            value, cell = self.load(on, key), Cell(on, key)
            if value.refs and len(values) > 2 and not values[2].some and not self.initial(cell):
                self.defaulted.add(cell)
                return replace(value, none=True, some=cell in self.state.heap)
            return value
        if name in ("zip", "enumerate"):
            parts = [Value(), *values] if name == "enumerate" else values
            return union(values, each=Value(items=tuple(v.element() for v in parts)))
        if name in PLAIN:
            return Value(deps=union(values).deps)
        return values[0] if name in ("list", "tuple", "reversed") and len(values) == 1 else None

    def other(self, node: ast.Call, on: Value) -> Value:
        """Of what is not read: of torch, of vLLM, a class, or a method of a tensor."""
        name, chain = called(node), ast.unparse(node.func)
        values, keywords = self.arguments(node)
        out = keywords.pop("out", None)
        is_method = bool(on.cells or on.tensor or on.each or on.items)
        values = [on, *values] if is_method else values
        given = union([*values[1:], *keywords.values()])
        every = union([*values[:1], given])
        if values and values[0].refs and name.endswith("_"):
            name = name.removeprefix("_foreach_")
            zero = name in ("fill_", "mul_") and values[1].const in (0, False)
            kind = CLEAR if zero or name in ("zero_", "zeros_") else STAGE
            kind = FILL if name in OVERWRITES and not zero else kind
            self.change(values[0], kind, given, node)
            return values[0]
        if is_method and name in SIZES:
            return Value(deps=every.deps)
        if is_method and name == "narrow" and len(values) > 2:
            return on.part(ROWS if values[2].const == 0 else PART)
        if is_method and name == "items":
            return union([on], each=Value(items=(Value(), on.element())))
        if is_method and name in VIEWS:
            return replace(on, deps=every.deps)
        if name[:1].isupper() or name in CONTAINERS:
            return replace(every, registered=name == "Buffer")
        self.use(every)
        shape = "_like" in name or name.removeprefix("new_") in ("zeros", "empty", "ones", "full")
        found = Value(deps=every.deps) if shape else every.computed()
        if out:
            self.change(out, FILL, found, node)
            return out
        if is_method and not shape:
            kept = {m._replace(on_meta=m.on_meta and name not in ("to", "cuda")) for m in on.made}
            return replace(found, made=frozenset(kept))
        if shape or chain.startswith(("torch.", "F.")):
            on_meta = self.in_tower and not any(k.arg == "device" for k in node.keywords)
            return replace(found, made=frozenset([Made(self.place(node), on_meta)]), tensor=True)
        return found

    def ev(self, node: ast.expr) -> Value:
        if self.state is None:
            return Value()
        match node:
            case ast.Constant(value=const):
                return replace(NONE, unless=self.asked) if const is None else Value(const=const)
            case ast.Name(id=name):
                owner = self.frames[-1].method.owner
                function = owner.module.functions.get(name)
                found = Value(method=(Method(owner, function), None)) if function else Value()
                return self.state.names.get(name, found)
            case ast.Attribute(value=base, attr=name):
                on = self.ev(base)
                if on.holds:
                    return self.load(on.holds, name)
                kept = replace(on.part(WHOLE), made=on.made if on.refs else frozenset())
                return Value(deps=on.deps) if name in SIZES else kept
            case ast.Subscript(value=base, slice=key):
                on = self.ev(base)
                found, copied = self.index(on, key)
                return found.computed() if copied and on.refs else found
            case ast.Call():
                return self.called(node)
            case ast.IfExp(test, body, orelse):
                return self.branch(test, lambda: self.ev(body), lambda: self.ev(orelse))
            case ast.BoolOp(values=values):
                return union(self.ev(value) for value in values)
            case ast.Starred(value=value):
                return self.ev(value)
            case ast.Yield(value=value):  # of a context manager; what comes after is not read
                self.execute(ast.Return(value))
                return NONE
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                items = tuple(self.ev(part) for part in parts)
                fixed = not any(isinstance(p, ast.Starred) for p in (node, *parts))
                keep = items if fixed and not isinstance(node, ast.Dict) else None
                return union(items, items=keep or None)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for generator in node.generators:
                    self.assign(generator.target, self.ev(generator.iter).element(), node)
                return union([self.ev(node.value if isinstance(node, ast.DictComp) else node.elt)])
        inner = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        found = union(self.ev(part) for part in inner)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In)):
            return Value(deps=found.deps)
        self.use(found)
        return found.computed()

    def index(self, on: Value, key: ast.expr) -> tuple[Value, bool]:
        """A part, and whether reading it makes a copy."""
        extent, copied = WHOLE, False
        for part in key.elts if isinstance(key, ast.Tuple) else [key]:
            if isinstance(part, ast.Slice):
                lower = self.ev(part.lower).const if part.lower else 0
                upper = self.ev(part.upper).const if part.upper else None
                rows = PART if lower != 0 or upper not in (None, UNKNOWN) else ROWS
                extent = max(extent, rows if part.lower or part.upper else WHOLE)
                continue
            value = self.ev(part)
            copied |= value.tensor
            if value.const is not UNKNOWN:
                if on.items and isinstance(value.const, int) and value.const < len(on.items):
                    return on.items[value.const], False
                extent = max(extent, PART if value.const not in (None, Ellipsis) else WHOLE)
            elif not value.tensor:
                extent = max(extent, LEVEL)
        if on.each or on.items:
            return (on.element() if extent == LEVEL else on), False
        return on.part(extent), copied

    def string(self, node: ast.expr) -> str:
        """A name, with `*` for what varies."""
        const = self.ev(node).const
        text = re.sub(r"\{.*?\}", "*", ast.unparse(node).strip("f'\""))
        return const if isinstance(const, str) else text


def facts(test: ast.expr, truth: bool) -> Iterator[tuple[ast.expr, bool, bool]]:
    """What a condition says: of what, whether it is there, and whether that means "not None"."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from facts(operand, not truth)
        case ast.BoolOp(op=op, values=values):
            for value in values if truth == isinstance(op, ast.And) else ():
                yield from facts(value, truth)
        case ast.Compare(left, [op], [ast.Constant(value=None)]):
            yield left, truth != isinstance(op, (ast.Is, ast.Eq)), True
        case _:
            yield test, truth, False


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")
