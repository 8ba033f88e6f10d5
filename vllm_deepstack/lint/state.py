"""Reads what `__init__`, `embed_input_ids` and `forward` do to attributes: in order, on all paths."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce

from .classes import EMBED, FORWARD, INIT, Class, Function, Method
from .values import (
    ARGUMENTS, LEVEL, NONE, PART, ROWS, UNKNOWN, WHOLE, Cell, Instance, Made, Place, Ref, Value,
    join, union,
)  # fmt: skip

MAKING, EMBEDDING, RUNNING = range(3)
BIND, CLEAR, FILL, STAGE = "bind", "clear", "fill", "stage"
OLD, CLEAN, NEW, READ, GONE = "old", "clean", "new", "read", "gone"
"""What an attribute holds: what an earlier call left, nothing, new contents in all rows; in
`forward`, what the decoder has read, and that it was cleared since."""
SIZES = {"size", "shape", "device", "dtype", "numel", "dim", "ndim", "is_meta", "item", "stride"}
VIEWS = {"view", "reshape", "narrow", "unsqueeze", "squeeze", "transpose", "permute", "expand"}
VIEWS |= {"t", "T", "flatten", "unbind", "chunk", "split", "select", "detach", "data", "values"}
VIEWS |= {"items", "tensors", "unflatten", "unfold", "get", "view_as", "expand_as"}
SHAPED = {"expand_as", "view_as", "type_as", "reshape_as"}
CONTAINERS = {"dict", "list", "tuple", "sorted", "reversed", "set", "next", "iter", "cast"}
SETTINGS = {"requires_grad_", "share_memory_", "pin_memory_", "retain_grad_"}
NOT_TENSORS = {"device", "dtype", "compile", "finfo", "iinfo", "no_grad", "get_default_dtype"}
ADDS = {"append", "extend", "update", "setdefault", "insert", "add"}
DEPTH = 12


@dataclass(frozen=True)
class Write(Place):
    cell: Cell
    kind: str
    value: Value


@dataclass(frozen=True)
class Handed(Place):
    """What reaches a call of a submodule."""

    unless: frozenset[Cell]
    from_row_0: bool
    experts: bool


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
    instance: Instance | None
    exits: list[tuple[State, Value, bool]] = field(default_factory=list)
    yielded: Callable[[Value], None] | None = None


class Reader:
    """Of one class."""

    def __init__(self, cls: Class):
        self.root = Instance(cls)
        self.phase = MAKING
        self.state: State | None = None
        self.frames: list[Frame] = []
        self.asked: frozenset[Cell] = frozenset()
        """What the conditions around a statement depend on."""
        self.in_tower = False
        self.writes: dict[int, list[Write]] = {MAKING: [], EMBEDDING: [], RUNNING: []}
        self.handed: dict[Cell, Handed] = {}
        self.wipes: dict[Cell, Place] = {}
        self.wiped: dict[Cell, Place] = {}
        self.recomputed: set[object] = set()
        self.defaulted: set[Cell] = set()
        self.read: set[Cell] = set()

    # Phases

    def embed(self) -> State:
        return self.step(EMBEDDING, EMBED, {})

    def forward(self, embedded: State) -> State:
        heap = {
            cell: join(self.initial(cell), value) if self.initial(cell) else value
            for cell, value in embedded.heap.items()
        }
        return self.step(RUNNING, FORWARD, heap)

    def step(self, phase: int, name: str, heap: dict[Cell, Value]) -> State:
        self.phase, self.state = phase, State(heap)
        method = self.root.cls.method(name)
        assert method
        arguments = method.node.args
        optional = {a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]}
        optional |= {a.arg for a in arguments.kwonlyargs}
        step = frozenset([ARGUMENTS])
        given = {
            a.arg: Value(
                data=step, deps=step, tensor=True, none=a.arg in optional,
                optional=a.arg in optional,
            )
            for a in (*arguments.args[1:], *arguments.kwonlyargs)
        }  # fmt: skip
        self.call(method, self.root, [], given)
        return self.state or State()

    def names_of_buffers(self) -> set[Cell]:
        """What a `named_buffers` of its own reads."""
        self.read = set()
        if method := self.root.cls.method("named_buffers"):
            self.phase, self.state = MAKING, State()
            self.call(method, self.root, [], {})
        return self.read

    def initial(self, cell: Cell) -> Value | None:
        owner = cell.owner
        if owner.initial is None:
            owner.initial = {}
            kept = self.phase, self.state, self.frames, self.asked, self.in_tower
            self.phase, self.state, self.in_tower = MAKING, State(), owner.in_tower
            self.frames, self.asked = kept[2][-1:] if owner is not self.root else [], frozenset()
            if method := owner.cls.method(INIT):
                self.call(method, owner, owner.arguments, owner.keywords)
            else:
                names = [n.target.id for n in owner.cls.node.body if is_field(n)]  # type: ignore
                values = {**dict(zip(names, owner.arguments)), **owner.keywords}
                self.state.heap = {Cell(owner, name): v for name, v in values.items()}
            owner.initial = self.state.heap if self.state else {}
            self.phase, self.state, self.frames, self.asked, self.in_tower = kept
        if cell in owner.initial:
            return owner.initial[cell]
        value = owner.cls.member(cell.name)
        if isinstance(value, ast.Constant):
            return Value(const=value.value, none=is_none(value), some=not is_none(value))
        return Value(listed=True) if isinstance(value, (ast.List, ast.Dict)) else None

    # Attributes

    @property
    def now(self) -> State:
        assert self.state is not None
        return self.state

    def place(self, node: ast.AST) -> Place:
        return Place(self.frames[-1].method, getattr(node, "lineno", 1))

    def load(self, instance: Instance, name: str) -> Value:
        cell = Cell(instance, name)
        self.read.add(cell)
        value = instance.cls.member(name)
        if isinstance(value, Method):
            if value.is_a("property"):
                return self.call(value, instance, [], {})
            return Value(method=(value, instance))
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.args:
            if value.func.id == "property" and isinstance(value.args[0], ast.Lambda):
                return self.apply(value.args[0], [Value(holds=instance)])
        held = self.now.heap.get(cell) or self.initial(cell)
        cells = frozenset([cell])
        if held is None:
            return Value(frozenset([Ref(cell, WHOLE, self.now.bound.get(cell))]), deps=cells)
        if held.holds or held.refs:
            return replace(held, deps=held.deps | cells)
        if held.const is not UNKNOWN and self.phase != MAKING and cell not in self.now.heap:
            held = replace(held, const=UNKNOWN)  # as a step has left it, not as it began
        refs = frozenset([Ref(cell, WHOLE, self.now.bound.get(cell))])
        return replace(held, refs=refs, data=frozenset(), deps=held.deps | cells, items=None)

    def store(self, instance: Instance, name: str, value: Value, node: ast.AST) -> None:
        if setter := instance.cls.setter(name):
            self.call(setter, instance, [value], {})
            return
        cell = Cell(instance, name)
        held = self.now.heap.get(cell) or (self.initial(cell) if self.phase != MAKING else None)
        if value.holds and held and held.holds and held.holds is not value.holds:
            for part in held.holds.initial or {}:
                new = self.load(value.holds, part.name)
                self.write(BIND, part, new.computed() if new.refs else new, node)
            return
        if value.holds and not value.holds.path:
            value.holds.path = f"{instance.path}.{name}".lstrip(".")
        self.write(BIND, cell, value, node)

    def write(self, kind: str, cell: Cell, value: Value, node: ast.AST) -> None:
        place, state = self.place(node), self.now
        self.writes[self.phase].append(Write(place.method, place.line, cell, kind, value))
        own = cell in value.cells
        if kind == BIND:
            if self.phase == RUNNING and value.refs and not own:
                state.heap[cell] = value
            else:
                state.heap[cell] = replace(value, refs=frozenset(), data=value.cells, items=None)
                if self.phase == MAKING:
                    state.heap[cell] = value
            if not own:
                token = state.bound[cell] = object()
                if self.phase == RUNNING and ARGUMENTS in value.data:
                    self.recomputed.add(token)
        if self.phase == MAKING or own or kind == STAGE:
            return
        if kind == BIND and self.phase == RUNNING and cell in self.asked:
            return  # it grows
        before = state.marks.get(cell, frozenset([OLD]))
        after = NEW if kind == FILL else CLEAN
        state.marks[cell] = frozenset(GONE if mark in (READ, GONE) else after for mark in before)
        if self.phase == RUNNING and not (kind != CLEAR and ARGUMENTS in value.data):
            self.wipes[cell] = place

    def change(self, target: Value, kind: str, value: Value, node: ast.AST) -> None:
        """In place."""
        for ref in target.refs:
            own = ref.cell in value.cells
            partly = kind in (CLEAR, FILL) and (ref.extent == PART or own)
            if not (partly and kind == CLEAR):
                self.write(STAGE if partly else kind, ref.cell, value, node)

    def use(self, value: Value) -> None:
        """Its contents are read, in `forward`."""
        if self.phase == RUNNING and self.state:
            for ref in value.refs:
                marks = self.state.marks.get(ref.cell, frozenset())
                current = ref.bound is self.state.bound.get(ref.cell)
                if current and marks & {CLEAN, NEW} and ref.cell in self.wipes:
                    if ref.bound not in self.recomputed:
                        self.wiped.setdefault(ref.cell, self.wipes[ref.cell])

    def hand_on(self, node: ast.Call, values: list[Value], callee: Instance | None) -> None:
        if self.phase != RUNNING:
            return
        experts = callee is not None and "FusedMoE(" in callee.cls.module.text
        place = self.place(node)
        for value in values:
            self.use(value)
            rows = {ref.cell for ref in value.refs if ref.extent == ROWS}
            new = {ref.cell for ref in value.refs if ref.bound in self.recomputed}
            for cell in value.cells - new:
                before = self.handed.get(cell)
                self.handed[cell] = Handed(
                    before.method if before else place.method,
                    before.line if before else place.line,
                    value.unless | (before.unless if before else frozenset()),
                    cell in rows or (before is not None and before.from_row_0),
                    experts or (before is not None and before.experts),
                )
        if callee and (method := callee.cls.method(FORWARD)):
            self.call_node(method, callee, node)
        for cell in {cell for value in values for cell in value.cells}:
            self.now.marks[cell] = frozenset([READ])

    # Paths

    def merge(self, a: State | None, b: State | None, by: Value | None = None) -> State | None:
        if a is None or b is None:
            return a or b
        deps = by.deps if by else frozenset()
        lenient = by is not None and self.phase == EMBEDDING and ARGUMENTS not in deps
        found = State()
        for cell in {*a.heap, *b.heap}:
            values = [v for s in (a, b) if (v := s.heap.get(cell) or self.initial(cell))]
            found.heap[cell] = join(*values)
        for cell in {*a.marks, *b.marks}:
            marks = [s.marks.get(cell, frozenset([OLD])) for s in (a, b)]
            found.marks[cell] = marks[0] | marks[1]
            if lenient and (marks[0] | marks[1]) & {CLEAN, NEW}:
                found.marks[cell] -= {OLD}  # nothing was there, or the same holds at every step
        for cell in {*a.bound, *b.bound}:
            one, two = a.bound.get(cell), b.bound.get(cell)
            found.bound[cell] = one if one is two else object()
        for name in {*a.names, *b.names}:
            values = [s.names[name] for s in (a, b) if name in s.names]
            found.names[name] = join(*values)
            if len({v.some for v in values}) == 2 and found.names[name].cells:
                value = found.names[name]
                found.names[name] = replace(value, unless=value.unless | deps)
        return found

    def branch(self, test: ast.expr, then: Callable[[], Value], other: Callable[[], Value]) -> Value:
        by, before, asked = self.ev(test), self.state, self.asked
        known, values, states = self.truth(test), [], []
        for truth, body in ((True, then), (False, other)):
            if known is (not truth) or before is None:
                continue
            self.state = before.copy()
            self.asked = asked | by.deps
            self.refine(test, truth)
            values.append(body())
            states.append(self.state)
        self.asked = asked
        self.state = reduce(lambda a, b: self.merge(a, b, by), states)
        if len(states) == 2 and None in states:
            self.asked |= by.deps  # the rest runs where this path has not left
        return join(*values)

    def truth(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            found = self.truth(test.operand)
            return None if found is None else not found
        if isinstance(test, ast.BoolOp):
            every = [self.truth(value) for value in test.values]
            decides = isinstance(test.op, ast.Or)
            if decides in every:
                return decides
            return None if None in every else not decides
        if isinstance(test, ast.Compare) and is_none(test.comparators[0]):
            value = self.ev(test.left)
            if value.none and value.some:
                return None
            return value.none == isinstance(test.ops[0], (ast.Is, ast.Eq))
        value = self.ev(test)
        if not value.some:
            return False
        return None if value.const is UNKNOWN else bool(value.const)

    def refine(self, test: ast.expr, truth: bool) -> None:
        """What a condition says of what it looks at."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.refine(test.operand, not truth)
        elif isinstance(test, ast.BoolOp):
            if truth == isinstance(test.op, ast.And):
                for value in test.values:
                    self.refine(value, truth)
        elif isinstance(test, ast.Compare) and is_none(test.comparators[0]):
            self.refine(test.left, truth != isinstance(test.ops[0], (ast.Is, ast.Eq)))
        elif isinstance(test, (ast.Name, ast.Attribute)) or called(test) == "getattr":
            value = self.ev(test)
            if isinstance(test, ast.Name) and test.id in self.now.names and truth:
                self.now.names[test.id] = value.known()
            if not truth:
                for ref in value.refs:
                    if ref.extent == WHOLE:
                        self.now.marks[ref.cell] = frozenset()  # there is none

    def run(self, body: Iterable[ast.stmt]) -> Value:
        for statement in body:
            if self.state is None:
                break
            getattr(self, f"run_{type(statement).__name__}", self.run_other)(statement)
        return NONE

    def run_other(self, node: ast.stmt) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.ev(part)

    def run_FunctionDef(self, node: Function) -> None:
        self.now.names[node.name] = Value(method=(Method(self.frames[-1].method.owner, node), None))

    def run_Assign(self, node: ast.Assign) -> None:
        value = self.ev(node.value)
        for target in node.targets:
            self.assign(target, value, node)

    def run_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.assign(node.target, self.ev(node.value), node)

    def run_AugAssign(self, node: ast.AugAssign) -> None:
        before, value = self.ev(as_load(node.target)), self.ev(node.value)
        if before.refs and (before.tensor or before.made or not isinstance(node.target, ast.Attribute)):
            self.change(before, STAGE, value, node)
        elif not isinstance(node.target, ast.Subscript):
            self.assign(node.target, union([before.computed(), value]), node)

    def run_Return(self, node: ast.Return) -> None:
        value = self.ev(node.value) if node.value else replace(NONE, unless=self.asked)
        given = ARGUMENTS in self.asked
        self.frames[-1].exits.append((self.now, value, given))
        self.state = None

    def run_Raise(self, node: ast.Raise) -> None:
        self.state = None

    def run_If(self, node: ast.If) -> None:
        self.branch(node.test, lambda: self.run(node.body), lambda: self.run(node.orelse))

    def run_For(self, node: ast.For) -> None:
        over = self.ev(node.iter)
        before = self.now.copy() if over.optional else None
        self.assign(node.target, over.element(), node)
        self.loop(node.body, before)
        self.run(node.orelse)

    def run_While(self, node: ast.While) -> None:
        self.ev(node.test)
        self.loop(node.body, None)

    def loop(self, body: list[ast.stmt], before: State | None) -> None:
        asked = self.asked
        begun = self.now.copy()
        self.run(body)
        self.asked = asked
        if self.state is None:  # `continue`, `break` or `return` on all paths
            self.state = begun
        self.state = self.merge(self.state, before)

    def run_Continue(self, node: ast.stmt) -> None:
        self.asked |= frozenset()

    def run_With(self, node: ast.With) -> None:
        self.enter(node, list(node.items))

    def enter(self, node: ast.With, items: list[ast.withitem]) -> None:
        if not items:
            self.run(node.body)
            return
        item, *rest = items
        frame, call = self.frames[-1], item.context_expr
        function = self.ev(call.func).method if isinstance(call, ast.Call) else None
        if (
            function
            and isinstance(function[0], Method)
            and function[0].is_a("contextmanager")
            and not function[0].name.startswith("_mark_")  # vLLM's own
        ):
            left: list[tuple[State, Value, bool]] = []
            fell = False

            def inside(value: Value) -> None:
                nonlocal fell
                count, names, frames = len(frame.exits), self.now.names, self.frames
                self.now.names, self.frames = outer, [*frames[: frames.index(frame) + 1]]
                if item.optional_vars:
                    self.assign(item.optional_vars, value, node)
                self.enter(node, rest)
                fell = self.state is not None
                left.extend(frame.exits[count:])
                del frame.exits[count:]
                self.frames = frames
                self.state = reduce(self.merge, [s for s, *_ in left], self.state)
                if self.state:
                    outer.clear()
                    outer.update(self.state.names)
                    self.state = replace(self.state, names=names)

            outer = self.now.names
            self.call_node(*function, call, inside)  # type: ignore[arg-type]
            if self.state:
                frame.exits += [(self.state.copy(), value, given) for _, value, given in left]
                self.state = self.state if fell else None
            return
        kept, self.in_tower = self.in_tower, self.in_tower or called(call) == "_mark_tower_model"
        if item.optional_vars:
            self.assign(item.optional_vars, self.ev(call), node)
        self.enter(node, rest)
        self.in_tower = kept

    def run_Try(self, node: ast.Try) -> None:
        exits, before = self.frames[-1].exits, self.now.copy()
        count = len(exits)
        self.run(node.body)
        ends = [self.state]
        for handler in node.handlers:
            self.state = self.merge(before.copy(), ends[0])
            self.run(handler.body)
            ends.append(self.state)
        self.state = ends[0]
        self.run(node.orelse)
        self.state = reduce(self.merge, [self.state, *ends[1:]])
        if node.finalbody:
            after, returned = self.state, exits[count:]
            del exits[count:]
            for state, value, given in returned:
                self.state = state
                self.run(node.finalbody)
                if self.state:
                    exits.append((self.state, value, given))
            self.state = after
            self.run(node.finalbody)

    def run_Match(self, node: ast.Match) -> None:
        subject, before, ends = self.ev(node.subject), self.now, []
        for case in node.cases:
            self.state = before.copy()
            for part in ast.walk(case.pattern):
                if name := getattr(part, "name", None):
                    self.state.names[name] = subject.known().part(LEVEL)
            self.run(case.body)
            ends.append(self.state)
        last = node.cases[-1]
        if not (isinstance(last.pattern, ast.MatchAs) and not last.pattern.pattern) or last.guard:
            ends.append(before)
        self.state = reduce(lambda a, b: self.merge(a, b, subject), ends)

    def assign(self, target: ast.expr, value: Value, node: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self.now.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for i, part in enumerate(target.elts):
                if value.holds:
                    fields = list(self.fields(value.holds))
                    new = self.load(value.holds, fields[i]) if i < len(fields) else Value()
                elif value.items is not None and i < len(value.items):
                    new = value.items[i]
                else:
                    new = value.part(PART if value.refs else LEVEL)
                self.assign(part.value if isinstance(part, ast.Starred) else part, new, node)
        elif isinstance(target, ast.Attribute):
            base = self.ev(target.value)
            if base.holds:
                self.store(base.holds, target.attr, value, node)
            elif target.attr == "data":
                for ref in base.refs:
                    self.write(BIND, ref.cell, value, node)
        elif isinstance(target, ast.Subscript):
            base = self.ev(target.value)
            if not base.refs:
                self.add(target.value, value)
                return
            found, copied = self.index(base, target.slice)
            whole = [ref for ref in base.refs if ref.extent == WHOLE]
            if base.listed and whole and not isinstance(target.slice, (ast.Slice, ast.Tuple)):
                for ref in whole:
                    self.write(BIND, ref.cell, union([value, base.computed()]), node)
            elif copied:
                self.change(base, STAGE, value, node)
            else:
                self.change(found, CLEAR if value.const in (0, False) else FILL, value, node)

    def fields(self, instance: Instance) -> Iterator[str]:
        return (n.target.id for n in instance.cls.node.body if is_field(n))  # type: ignore

    def add(self, target: ast.expr, value: Value) -> None:
        """To a container that is a local name."""
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and target.id in self.now.names:
            held = self.now.names[target.id]
            if value.cells or value.made or value.tensor:
                value = replace(value, unless=value.unless | self.asked)
            if not held.holds:
                self.now.names[target.id] = replace(union([held, value]), listed=held.listed)

    # Calls

    def call_node(
        self,
        function: Method | ast.Lambda,
        instance: Instance | None,
        node: ast.Call,
        yielded: Callable[[Value], None] | None = None,
    ) -> Value:
        values, keywords = self.arguments(node)
        if isinstance(function, ast.Lambda):
            return self.apply(function, values)
        return self.call(function, instance, values, keywords, yielded)

    def arguments(self, node: ast.Call) -> tuple[list[Value], dict[str, Value]]:
        values = []
        for part in node.args:
            value = self.ev(part)
            if isinstance(part, ast.Starred):
                values += value.items or [value.element()]
            else:
                values.append(value)
        return values, {k.arg or "**": self.ev(k.value) for k in node.keywords}

    def apply(self, function: ast.Lambda, values: list[Value]) -> Value:
        with self.scope():
            self.now.names |= dict(zip([a.arg for a in function.args.args], values))
            return self.ev(function.body)

    @contextmanager
    def scope(self) -> Iterator[None]:
        names = dict(self.now.names)
        yield
        if self.state:
            self.state.names = names

    def call(
        self,
        method: Method,
        instance: Instance | None,
        values: list[Value],
        keywords: dict[str, Value],
        yielded: Callable[[Value], None] | None = None,
    ) -> Value:
        running = [frame.method for frame in self.frames]
        if method in running or len(running) > DEPTH:
            return union([*values, *keywords.values()]).computed()
        arguments = method.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        given = dict(keywords)
        if instance is not None and not method.is_a("staticmethod") and names:
            given[names.pop(0)] = Value(holds=instance)
        given |= dict(zip(names, values))
        for name, default in zip(names[::-1], arguments.defaults[::-1]):
            given.setdefault(name, self.ev(default))
        for a, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults):
            given.setdefault(a.arg, self.ev(keyword) if keyword else Value())
        kept, asked = self.now.names, self.asked
        self.now.names = {a: v for a, v in given.items() if a != "**"}
        if arguments.kwarg:
            self.now.names[arguments.kwarg.arg] = union(given.values())
        if "**" in given:
            for name in names:
                self.now.names.setdefault(name, given["**"])
        frame = Frame(method, instance, yielded=yielded)
        self.frames.append(frame)
        self.run(method.node.body)
        self.frames.pop()
        self.asked = asked
        ends = [*frame.exits]
        if self.state:
            ends.append((self.state, NONE, True))
        self.state = None
        for state, _, given_ in sorted(ends, key=lambda end: not end[2]):
            self.state = self.merge(self.state, state, None if given_ else Value())
        if self.state:
            self.state.names = kept
        returned = [value for _, value, _ in ends if value is not NONE] or [NONE]
        return join(*returned)

    def ev_Call(self, node: ast.Call) -> Value:
        name = called(node)
        if isinstance(node.func, ast.Name):
            owner = self.frames[-1].method.owner
            if name in owner.module.classes and name not in self.now.names:
                if cls := owner.sibling(name):
                    return Value(holds=Instance(cls, *self.arguments(node), self.in_tower))
            if found := self.builtin(node, name):
                return found
        elif isinstance(node.func, ast.Attribute):
            if called(node.func.value) == "super":
                frame = self.frames[-1]
                after = frame.instance and frame.instance.cls.method(name, frame.method.owner)
                return self.call_node(after, frame.instance, node) if after else self.unknown(node)
            base = self.base(node.func.value)
            if base:
                method = base.method(name)
                values, keywords = self.arguments(node)
                if method and values and values[0].holds:
                    return self.call(method, values[0].holds, values[1:], keywords)
                return union(values)
        function = self.ev(node.func)
        if function.method:
            return self.call_node(*function.method, node)
        if isinstance(node.func, ast.Attribute):
            on = self.ev(node.func.value)
            if on.holds and name in ("register_buffer", "register_parameter"):
                values, keywords = self.arguments(node)
                key = self.string(node.args[0] if node.args else node.keywords[0].value)
                tensor = [*values[1:], *(keywords.get(k) for k in ("tensor", "param"))][0]
                if key and tensor:
                    tensor = replace(tensor, registered=name == "register_buffer")
                    self.store(on.holds, key, tensor, node)
                return NONE
            if on.refs and name.endswith("_") and not name.endswith("__"):
                return self.in_place(name, on, node, *self.arguments(node))
            if not on.refs and name in ADDS:
                values, keywords = self.arguments(node)
                self.add(node.func.value, union([*values, *keywords.values()]))
                return union([on, *values])
            submodule = on.holds or (on.refs and not (on.made or on.tensor or on.listed))
            if submodule:
                return self.submodule(node, function)
            if on.cells or on.tensor or on.each or on.items:
                return self.method_of(on, name, node)
        elif function.holds or (function.refs and self.phase != MAKING):
            return self.submodule(node, function)
        return self.unknown(node)

    def base(self, node: ast.expr) -> Class | None:
        """A base class by its name, as in `Base.embed_input_ids(self)`."""
        frame = self.frames[-1]
        if isinstance(node, ast.Name) and frame.instance and node.id not in self.now.names:
            return next((c for c in frame.instance.cls.lineage[1:] if c.name == node.id), None)
        return None

    def builtin(self, node: ast.Call, name: str) -> Value | None:
        if name in ("getattr", "setattr") and len(node.args) > 1:
            on, key = self.ev(node.args[0]), self.string(node.args[1])
            if not (on.holds and key):
                return None
            if name == "setattr":
                self.store(on.holds, key, self.ev(node.args[2]), node)
                return NONE
            value = self.load(on.holds, key)
            cell = Cell(on.holds, key)
            if len(node.args) > 2 and is_none(node.args[2]) and not self.initial(cell):
                if value.refs:
                    self.defaulted.add(cell)
                    value = replace(value, none=True)
            return value
        values = [self.ev(a) for a in node.args if not isinstance(a, ast.Lambda)]
        if name == "zip":
            return Value(each=Value(items=tuple(v.element() for v in values)))
        if name == "enumerate" and values:
            return Value(each=Value(items=(Value(), values[0].element())), optional=values[0].optional)
        if name in ("range", "len", "isinstance", "hasattr", "int", "id", "type", "bool", "any"):
            return Value(deps=union(values).deps)
        if name in ("list", "tuple", "reversed", "iter") and len(values) == 1:
            return values[0]
        return None

    def in_place(
        self, name: str, on: Value, node: ast.Call, values: list[Value], keywords: dict[str, Value]
    ) -> Value:
        value = union([*values, *keywords.values()])
        const = values[0].const if values else UNKNOWN
        if name in ("zero_", "zeros_") or (name in ("fill_", "mul_") and const in (0, False)):
            self.change(on, CLEAR, Value(), node)
        elif name in ("copy_", "fill_", "normal_", "uniform_", "set_"):
            self.change(on, FILL, value, node)
        elif name not in SETTINGS:
            self.change(on, STAGE, value, node)
        return on

    def submodule(self, node: ast.Call, function: Value) -> Value:
        values, keywords = self.arguments(node)
        self.hand_on(node, [*values, *keywords.values()], function.holds)
        deps = union([*values, *keywords.values()]).deps
        return Value(data=deps & {ARGUMENTS}, deps=deps, tensor=True)

    def method_of(self, on: Value, name: str, node: ast.Call) -> Value:
        values, keywords = self.arguments(node)
        given = union([*values, *keywords.values()])
        if name in SIZES:
            return Value(deps=on.deps | given.deps)
        if name.startswith("new_"):
            return self.makes(node, Value(deps=on.deps | given.deps))
        if name == "narrow" and len(values) > 1:
            return on.part(ROWS if values[1].const == 0 else PART)
        if name == "items":
            return Value(each=Value(items=(Value(), on.element())))
        if name in VIEWS:
            return replace(on, deps=on.deps | given.deps, const=UNKNOWN)
        self.use(on)
        found = union([on, given]).computed()
        if self.phase == MAKING and on.made:
            moved = name in ("to", "cuda")
            found = replace(found, made=frozenset(
                Made(made.place, made.on_meta and not moved) for made in on.made
            ))  # fmt: skip
        return found

    def makes(self, node: ast.Call, value: Value) -> Value:
        on_meta = self.in_tower and not any(k.arg == "device" for k in node.keywords)
        return replace(value, made=frozenset([Made(self.place(node), on_meta)]), tensor=True)

    def unknown(self, node: ast.Call) -> Value:
        """Of a function that is not read: of torch, of vLLM, or a class."""
        name = called(node)
        values, keywords = self.arguments(node)
        out = keywords.pop("out", None)
        every = union([*values, *keywords.values()])
        if values and name.endswith("_") and values[0].refs and name.strip("_"):
            return self.in_place(name.removeprefix("_foreach_"), values[0], node, values[1:], keywords)
        chain = ast.unparse(node.func)
        if name in ("Buffer", "Parameter", "ParameterList", "BufferList"):
            return replace(every, registered=name == "Buffer", const=UNKNOWN)
        if name[:1].isupper() or name in CONTAINERS:
            return replace(every, const=UNKNOWN)
        self.use(every)
        shape = "_like" in name or name in ("zeros", "empty", "ones", "full")
        found = Value(deps=every.deps) if shape else every.computed()
        if out:
            self.change(out, FILL, found, node)
            return out
        torch = chain.startswith(("torch.", "F.", "nn.functional.")) and name not in NOT_TENSORS
        return self.makes(node, found) if torch else found

    # Expressions

    def ev(self, node: ast.expr) -> Value:
        if self.state is None:
            return Value()
        return getattr(self, f"ev_{type(node).__name__}", self.ev_other)(node)

    def ev_other(self, node: ast.expr) -> Value:
        """Computed from its parts."""
        parts = [self.ev(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        for part in parts:
            self.use(part)
        return union(parts).computed()

    def ev_Constant(self, node: ast.Constant) -> Value:
        if node.value is None:
            return replace(NONE, unless=self.asked)
        return Value(const=node.value)

    def ev_Name(self, node: ast.Name) -> Value:
        if node.id in self.now.names:
            return self.now.names[node.id]
        owner = self.frames[-1].method.owner if self.frames else self.root.cls
        for function in owner.module.body:
            if isinstance(function, Function) and function.name == node.id:
                return Value(method=(Method(owner, function), None))
        return Value()

    def ev_Attribute(self, node: ast.Attribute) -> Value:
        if called(node.value) == "super" and self.frames[-1].instance:
            return Value()
        on = self.ev(node.value)
        if on.holds:
            return self.load(on.holds, node.attr)
        if node.attr in SIZES:
            return Value(deps=on.deps)
        return on.part(WHOLE) if on.refs else replace(on.part(WHOLE), made=frozenset())

    def ev_Subscript(self, node: ast.Subscript) -> Value:
        base = self.ev(node.value)
        found, copied = self.index(base, node.slice)
        return found.computed() if copied and base.refs else found

    def index(self, base: Value, key: ast.expr) -> tuple[Value, bool]:
        """A part, and whether reading it makes a copy."""
        extent, copied = WHOLE, False
        for part in key.elts if isinstance(key, ast.Tuple) else [key]:
            if isinstance(part, ast.Slice):
                lower = self.ev(part.lower).const if part.lower else 0
                upper = self.ev(part.upper).const if part.upper else None
                if lower != 0 or upper not in (None, UNKNOWN):
                    extent = PART
                elif part.upper:
                    extent = max(extent, ROWS)
            elif (value := self.ev(part)).tensor:
                copied = True
            elif value.const is not UNKNOWN:
                if base.items and isinstance(value.const, int) and value.const < len(base.items):
                    return base.items[value.const], False
                extent = max(extent, PART if value.const not in (None, Ellipsis) else WHOLE)
            else:
                extent = max(extent, LEVEL)
        if base.each or base.items:
            return (base.element() if extent == LEVEL else base), False
        return base.part(extent), copied

    def ev_IfExp(self, node: ast.IfExp) -> Value:
        return self.branch(node.test, lambda: self.ev(node.body), lambda: self.ev(node.orelse))

    def ev_BoolOp(self, node: ast.BoolOp) -> Value:
        values = [self.ev(value) for value in node.values]
        return union(values) if isinstance(node.op, ast.Or) else replace(union(values), none=False)

    def ev_Compare(self, node: ast.Compare) -> Value:
        parts = [self.ev(part) for part in (node.left, *node.comparators)]
        plain = isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn))
        return Value(deps=union(parts).deps) if plain else union(parts).computed()

    def ev_Tuple(self, node: ast.Tuple | ast.List) -> Value:
        items = tuple(self.ev(part) for part in node.elts)
        fixed = items if not any(isinstance(p, ast.Starred) for p in node.elts) else None
        return replace(union(items), items=fixed or None, listed=isinstance(node, ast.List))

    ev_List = ev_Tuple

    def ev_Starred(self, node: ast.Starred) -> Value:
        return self.ev(node.value)

    def ev_Dict(self, node: ast.Dict) -> Value:
        for key in node.keys:
            if key:
                self.ev(key)
        return replace(union(self.ev(value) for value in node.values), listed=True)

    def comprehension(self, node: ast.expr, *parts: ast.expr) -> Value:
        with self.scope():
            for generator in node.generators:  # type: ignore[attr-defined]
                over = self.ev(generator.iter)
                self.assign(generator.target, over.element(), node)
            found = [self.ev(part) for part in parts][-1]
        return replace(found.part(WHOLE), listed=True)

    def ev_ListComp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Value:
        return self.comprehension(node, node.elt)

    ev_GeneratorExp = ev_SetComp = ev_ListComp

    def ev_DictComp(self, node: ast.DictComp) -> Value:
        return self.comprehension(node, node.key, node.value)

    def ev_Lambda(self, node: ast.Lambda) -> Value:
        return Value(method=(node, None))

    def ev_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.ev(node.value)
        self.assign(node.target, value, node)
        return value

    def ev_Await(self, node: ast.Await) -> Value:
        return self.ev(node.value)

    def ev_Yield(self, node: ast.Yield) -> Value:
        value = self.ev(node.value) if node.value else NONE
        if (yielded := self.frames[-1].yielded) and self.state:
            yielded(value)
        return Value()

    def string(self, node: ast.expr) -> str | None:
        """A name, with `*` for what varies."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "*"
        if isinstance(node, ast.JoinedStr):
            return "".join(self.string(part) or "*" for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return f"{self.string(node.left) or '*'}{self.string(node.right) or '*'}"
        if isinstance(node, ast.Name):
            const = self.ev(node).const
            return const if isinstance(const, str) else None
        return "*" if isinstance(node, (ast.FormattedValue, ast.Call)) else None


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def as_load(node: ast.expr) -> ast.expr:
    return node
