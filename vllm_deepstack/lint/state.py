"""Reads what `__init__`, `embed_input_ids` and `forward` do to attributes: in order, on all paths."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce

from .classes import EMBED, FORWARD, INIT, Class, Function, Method
from .values import ARGUMENTS, LEVEL, NONE, PART, ROWS, UNKNOWN, WHOLE
from .values import Cell, Instance, Made, Place, Ref, Value, join, union

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
SETTINGS = {"requires_grad_", "share_memory_", "pin_memory_"}
PLAIN = {"range", "len", "isinstance", "hasattr", "int", "bool", "any", "all", "type"}
CONTAINERS = {"dict", "list", "tuple", "sorted", "reversed", "set", "next", "iter", "cast"}
DEPTH = 12
Given = tuple[list[Value], dict[str, Value]]


@dataclass(frozen=True)
class Write(Place):
    cell: Cell
    kind: str
    value: Value


@dataclass
class Handed:
    """What reaches a call of a submodule."""

    place: Place
    unless: frozenset[Cell] = frozenset()
    from_row_0: bool = False
    experts: bool = False


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
        self.state: State | None = None  # None: no path leads here
        self.frames: list[Frame] = []
        self.asked: frozenset[Cell] = frozenset()  # by the conditions around a statement
        self.writes: tuple[list[Write], ...] = ([], [], [])
        self.handed: dict[Cell, Handed] = {}
        self.wipes: dict[Cell, Place] = {}  # the latest
        self.wiped: dict[Cell, Place] = {}  # and then read
        self.sliced: dict[Cell, Place] = {}
        self.recomputed: set[object] = set()  # bindings, to what `forward` has from its arguments
        self.defaulted: set[Cell] = set()

    def embed(self) -> State:
        return self.step(EMBEDDING, EMBED, {})

    def forward(self, embedded: State) -> State:
        return self.step(RUNNING, FORWARD, (self.merge(State(), embedded) or embedded).heap)

    def step(self, phase: int, name: str, heap: dict[Cell, Value]) -> State:
        self.phase, self.state, method = phase, State(heap), self.root.cls.method(name)
        assert method
        args, step = method.node.args, frozenset([ARGUMENTS])
        optional = {a.arg for a in args.args[len(args.args) - len(args.defaults) :]}
        optional |= {a.arg for a in args.kwonlyargs}
        value = Value(data=step, deps=step, tensor=True)
        given = {
            a.arg: replace(value, none=a.arg in optional, optional=a.arg in optional)
            for a in (*args.args[1:], *args.kwonlyargs)
        }
        self.call(method, self.root, ([], given))
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
                values = dict(zip([getattr(f, "id", "") for f in fields], owner.given[0]))
                self.state.heap = {
                    Cell(owner, k): v for k, v in {**values, **owner.given[1]}.items()
                }
            owner.initial = self.state.heap if self.state else {}
            self.phase, self.state, self.asked, self.in_tower = kept
        if cell in (owner.initial or {}):
            return (owner.initial or {})[cell]
        member = owner.cls and owner.cls.member(cell.name)
        if isinstance(member, ast.Constant):
            return NONE if member.value is None else Value(const=member.value)
        return Value(listed=True) if isinstance(member, (ast.List, ast.Dict)) else None

    # What happens to an attribute

    @property
    def now(self) -> State:
        assert self.state is not None
        return self.state

    def place(self, node: ast.AST) -> Place:
        return Place(self.frames[-1].method, getattr(node, "lineno", 1))

    def load(self, on: Instance, name: str) -> Value:
        cell, member = Cell(on, name), on.cls.member(name)
        if isinstance(member, Method):
            bound = Value(method=(member, on))
            return self.call(member, on, ([], {})) if member.is_a("property") else bound
        held = self.now.heap.get(cell) or self.initial(cell) or Value()
        deps = held.deps | {cell}
        if held.holds or held.refs:
            return replace(held, deps=deps)
        if cell not in self.now.heap:
            held = replace(held, const=UNKNOWN)  # as a step has left it, not as it began
        ref = Ref(cell, WHOLE, self.now.bound.get(cell))
        return replace(held, refs=frozenset([ref]), data=frozenset(), deps=deps, items=None)

    def store(self, on: Instance, name: str, value: Value, node: ast.AST) -> None:
        if setter := on.cls.setter(name):
            self.call(setter, on, ([value], {}))
            return
        if value.holds and not value.holds.path:
            value.holds.path = f"{on.path}.{name}".lstrip(".")
        self.write(BIND, Cell(on, name), value, node)

    def write(self, kind: str, cell: Cell, value: Value, node: ast.AST) -> None:
        place, state, own = self.place(node), self.now, cell in value.cells
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
            if ref.extent != PART and ref.cell not in value.cells:
                self.write(kind, ref.cell, value, node)
            elif kind != CLEAR:
                self.write(STAGE, ref.cell, value, node)

    def use(self, value: Value) -> None:
        for ref in value.refs if self.phase == RUNNING and self.state else ():
            current = ref.bound is self.now.bound.get(ref.cell) not in self.recomputed
            if current and self.now.marks.get(ref.cell, frozenset()) & {CLEAN, NEW}:
                if ref.cell in self.wipes:
                    self.wiped.setdefault(ref.cell, self.wipes[ref.cell])

    def slice(self, value: Value, node: ast.AST) -> None:
        for cell in value.cells if self.phase == RUNNING else ():
            self.sliced.setdefault(cell, self.place(node))

    def hand_on(self, node: ast.Call, on: Instance | None) -> Value:
        """To a submodule."""
        values, keywords = self.arguments(node)
        values = [*values, *keywords.values()]
        for value in values if self.phase == RUNNING else ():
            self.use(value)
            for cell in value.cells - {r.cell for r in value.refs if r.bound in self.recomputed}:
                handed = self.handed.setdefault(cell, Handed(self.place(node)))
                handed.unless |= value.unless
                handed.from_row_0 |= any(r.cell == cell and r.extent == ROWS for r in value.refs)
                handed.experts |= on is not None and "FusedMoE(" in on.cls.module.text
        if self.phase == RUNNING:
            if on and (method := on.cls.method(FORWARD)):
                self.call(method, on, self.arguments(node))
            for cell in union(values).cells if self.state else ():
                self.now.marks[cell] = frozenset([READ])
        deps = union(values).deps
        return Value(data=deps & {ARGUMENTS}, deps=deps, tensor=True)

    # Paths

    def merge(
        self, a: State | None, b: State | None, deps: frozenset[Cell] | None = None
    ) -> State | None:
        """`deps`: of the condition between them."""
        if a is None or b is None:
            return a or b
        found, both = State(), (a, b)
        for cell in {*a.heap, *b.heap}:
            values = [v for s in both if (v := s.heap.get(cell) or self.initial(cell))]
            found.heap[cell] = join(*values)
        for cell in {*a.marks, *b.marks}:
            found.marks[cell] = frozenset().union(*(s.marks.get(cell, {OLD}) for s in both))
            if deps is not None and self.phase == EMBEDDING and ARGUMENTS not in deps:
                if found.marks[cell] & {CLEAN, NEW}:
                    found.marks[cell] -= {OLD}  # nothing is there, or it is so at every step
        for cell in {*a.bound, *b.bound}:
            one, two = a.bound.get(cell), b.bound.get(cell)
            found.bound[cell] = one if one is two else object()
        for name in {*a.names, *b.names}:
            values = [s.names[name] for s in both if name in s.names]
            value = join(*values)
            withheld = value.cells and len({v.some for v in values}) == 2
            more = deps if withheld and deps else frozenset()
            found.names[name] = replace(value, unless=value.unless | more)
        return found

    def branch(self, test: ast.expr, *bodies: Callable[[], Value]) -> Value:
        deps, before, asked = self.ev(test).deps, self.now, self.asked
        known, values, states = self.truth(test), [], []
        for truth, body in zip((True, False), bodies):
            if known is not (not truth):
                self.state, self.asked = before.copy(), asked | deps
                self.refine(test, truth)
                values.append(body())
                states.append(self.state)
        left = len(states) == 2 and None in states  # the rest runs where one path has not left
        self.asked = asked | deps if left else asked
        self.state = reduce(partial(self.merge, deps=deps), states)
        return join(*values)

    def truth(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            found = self.truth(test.operand)
            return None if found is None else not found
        if isinstance(test, ast.BoolOp):
            every, decides = [self.truth(v) for v in test.values], isinstance(test.op, ast.Or)
            return decides if decides in every else None if None in every else not decides
        if isinstance(test, ast.Compare) and is_none(test.comparators[0]):
            value = self.ev(test.left)
            same = value.none == isinstance(test.ops[0], (ast.Is, ast.Eq))
            return None if value.none and value.some else same
        value = self.ev(test)
        unknown = value.const is UNKNOWN and value.some
        return None if unknown else value.some and bool(value.const)

    def refine(self, test: ast.expr, truth: bool) -> None:
        """What a condition says of what it looks at."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.refine(test.operand, not truth)
        elif isinstance(test, ast.BoolOp):
            for value in test.values if truth == isinstance(test.op, ast.And) else ():
                self.refine(value, truth)
        elif isinstance(test, ast.Compare) and is_none(test.comparators[0]):
            self.refine(test.left, truth != isinstance(test.ops[0], (ast.Is, ast.Eq)))
        elif isinstance(test, (ast.Name, ast.Attribute)) or called(test) == "getattr":
            value = self.ev(test)
            if truth and isinstance(test, ast.Name) and test.id in self.now.names:
                there = replace(value, none=False, some=True, optional=False, unless=frozenset())
                self.now.names[test.id] = there
            for ref in () if truth else value.refs:
                if ref.extent == WHOLE:
                    self.now.marks[ref.cell] = frozenset()  # there is no such state

    def run(self, body: list[ast.stmt]) -> Value:
        for statement in body:
            if self.state is None:
                break
            getattr(self, f"run_{type(statement).__name__}", self.run_other)(statement)
        return NONE

    def run_other(self, node: ast.stmt) -> None:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.ev(part)

    def run_Assign(self, node: ast.Assign) -> None:
        value = self.ev(node.value)
        for target in node.targets:
            self.assign(target, value, node)

    def run_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.assign(node.target, self.ev(node.value), node)

    def run_AugAssign(self, node: ast.AugAssign) -> None:
        before, value = self.ev(node.target), self.ev(node.value)
        if before.refs and (before.tensor or before.made):
            self.change(before, STAGE, value, node)
        elif not isinstance(node.target, ast.Subscript):
            self.assign(node.target, union([before.computed(), value]), node)

    def run_Return(self, node: ast.Return | ast.Raise) -> None:
        if isinstance(node, ast.Return):
            value = self.ev(node.value) if node.value else replace(NONE, unless=self.asked)
            self.frames[-1].exits.append((self.now, value, ARGUMENTS in self.asked))
        self.state = None

    run_Raise = run_Return

    def run_If(self, node: ast.If) -> None:
        self.branch(node.test, lambda: self.run(node.body), lambda: self.run(node.orelse))

    def run_For(self, node: ast.For | ast.While) -> None:
        over = self.ev(node.iter if isinstance(node, ast.For) else node.test)
        before, asked = self.now.copy(), self.asked
        if isinstance(node, ast.For):
            self.assign(node.target, over.element(), node)
        self.run(node.body)
        skipped = over.optional and isinstance(node, ast.For)
        self.state, self.asked = self.state or before, asked
        self.state = self.merge(self.state, before) if skipped else self.state

    run_While = run_For

    def run_With(self, node: ast.With) -> None:
        outside, after, names = self.in_tower, [], self.now.names
        for item in node.items:
            call, value = item.context_expr, Value()
            self.in_tower |= called(call) == "_mark_tower_model"
            on = self.ev(call.func).method if isinstance(call, ast.Call) else None
            if on and on[0].is_a("contextmanager") and not on[0].name.startswith("_mark_"):
                first, second, value = halves(on[0].node)
                given = [a.arg for a in on[0].node.args.args]
                values = [Value(holds=on[1]), *self.arguments(call)[0]]  # type: ignore[arg-type]
                self.now.names = inner = dict(zip(given, values))
                self.frames.append(Frame(*on))
                self.run(first)
                value = self.ev(value) if value else NONE
                self.frames.pop()
                after.append((on, second, inner))
                self.now.names = names
            elif item.optional_vars:
                value = self.ev(call)
            if item.optional_vars:
                self.assign(item.optional_vars, value, node)
        self.finally_(node.body, partial(self.leave, after))
        self.in_tower = outside

    def leave(self, contexts: list[tuple[tuple, list[ast.stmt], dict[str, Value]]]) -> None:
        for on, body, inner in contexts:
            names, self.now.names = self.now.names, inner
            self.frames.append(Frame(*on))
            self.run(body)
            self.frames.pop()
            if self.state:
                self.state.names = names

    def finally_(self, body: list[ast.stmt], after: Callable[[], object]) -> None:
        """`after` runs however `body` is left."""
        exits = self.frames[-1].exits
        count = len(exits)
        self.run(body)
        ends = [*exits[count:], (self.state, None, False)]
        del exits[count:]
        for state, value, given in ends:
            self.state = state
            if state:
                after()
            if self.state and value:
                exits.append((self.state, value, given))

    def run_Try(self, node: ast.Try) -> None:
        if node.finalbody:
            body: list[ast.stmt] = [ast.Try(node.body, node.handlers, node.orelse, [])]
            self.finally_(body, lambda: self.run(node.finalbody))
            return
        before = self.now.copy()
        self.run(node.body)
        end = self.state
        self.run(node.orelse)
        ends = [self.state]
        for handler in node.handlers:
            self.state = self.merge(before.copy(), end)
            self.run(handler.body)
            ends.append(self.state)
        self.state = reduce(self.merge, ends)

    def run_Match(self, node: ast.Match) -> None:
        subject, before, ends = self.ev(node.subject), self.now, []
        for case in node.cases:
            self.state = before.copy()
            for part in ast.walk(case.pattern):
                if name := getattr(part, "name", None):
                    self.state.names[name] = subject.part(LEVEL)
            self.run(case.body)
            ends.append(self.state)
        last = node.cases[-1]
        if not isinstance(last.pattern, ast.MatchAs) or last.pattern.pattern or last.guard:
            ends.append(before)
        self.state = reduce(partial(self.merge, deps=subject.deps), ends)

    def assign(self, target: ast.expr, value: Value, node: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self.now.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for i, part in enumerate(target.elts):
                known = value.items is not None and i < len(value.items)
                new = value.items[i] if known and value.items else value.part(PART)
                self.assign(getattr(part, "value", part) if is_star(part) else part, new, node)
        elif isinstance(target, ast.Attribute):
            on = self.ev(target.value)
            if on.holds:
                self.store(on.holds, target.attr, value, node)
            for ref in on.refs if target.attr == "data" else ():
                self.write(BIND, ref.cell, value, node)
        elif isinstance(target, ast.Subscript):
            on = self.ev(target.value)
            part, copied = self.index(on, target.slice)
            whole = on.listed and not isinstance(target.slice, (ast.Slice, ast.Tuple))
            if not on.refs:
                self.add(target.value, value)
            elif whole and (ref := next((r for r in on.refs if r.extent == WHOLE), None)):
                self.write(BIND, ref.cell, union([value, on.computed()]), node)
            else:
                kind = CLEAR if value.const in (0, False) else FILL
                self.change(on if copied else part, STAGE if copied else kind, value, node)

    def add(self, target: ast.expr, value: Value) -> None:
        """To a container that is a local name."""
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and (held := self.now.names.get(target.id)):
            if value.cells or value.made or value.tensor:
                value = replace(value, unless=value.unless | self.asked)
            new = union([held, value], listed=held.listed)
            self.now.names[target.id] = held if held.holds else new

    # Calls

    def arguments(self, node: ast.Call) -> Given:
        values, keywords = [self.ev(part) for part in node.args], dict[str, Value]()
        for keyword in node.keywords:
            name, value = keyword.arg or "**", self.ev(keyword.value)
            keywords[name] = union([keywords[name], value]) if name in keywords else value
        return values, keywords

    def call(self, method: Method, on: Instance | None, given: Given) -> Value:
        values, keywords = given
        if method in [f.method for f in self.frames] or len(self.frames) > DEPTH:
            return union([*values, *keywords.values()]).computed()
        args = method.node.args
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
        kept, asked, frame = self.now.names, self.asked, Frame(method, on)
        self.now.names = bound
        self.frames.append(frame)
        self.run(method.node.body)
        self.frames.pop()
        ends = [*frame.exits, *([(self.state, NONE, True)] if self.state else [])]
        self.state, self.asked = None, asked
        for state, _, depends in sorted(ends, key=lambda end: not end[2]):
            self.state = self.merge(self.state, state, None if depends else frozenset())
        if self.state:
            self.state.names = kept
        return join(*([v for _, v, _ in ends if v is not NONE] or [NONE]))

    def ev_Call(self, node: ast.Call) -> Value:
        name, func, frame = called(node), node.func, self.frames[-1]
        if isinstance(func, ast.Attribute) and called(func.value) == "super" and frame.on:
            start, lineage = func.value.args, frame.on.cls.lineage  # type: ignore[attr-defined]
            names = {ast.unparse(start[0])} if start else {frame.method.owner.name}
            after = next((cls for cls in lineage if cls.name in names), None)
            method = frame.on.cls.method(name, after) if after else None
            return self.call(method, frame.on, self.arguments(node)) if method else self.other(node)
        if isinstance(func, ast.Name) and func.id not in self.now.names:
            owner = frame.method.owner
            if name in owner.module.classes and (cls := owner.sibling(name)):
                return Value(holds=Instance(cls, self.arguments(node), self.in_tower))
            if found := self.builtin(node, name):
                return found
        chained = isinstance(func, ast.Attribute) and not isinstance(func.value, ast.Name)
        if chained and "embed" in name and self.phase == EMBEDDING:
            return self.hand_on(node, None)  # the decoder's: what `__init__` makes is not asked for
        function = self.ev(func)
        if function.method:
            return self.call(*function.method, self.arguments(node))
        on = self.ev(func.value) if isinstance(func, ast.Attribute) else Value()
        if on.holds and name.startswith("register_"):
            values, keywords = self.arguments(node)
            keywords = {**dict(zip(("name", "tensor"), values)), **keywords}
            key = self.string(node.args[0] if node.args else node.keywords[0].value)
            tensor = replace(keywords.get("tensor", NONE), registered=name == "register_buffer")
            self.store(on.holds, key, tensor, node)
            return NONE
        if name in ADDS and not on.refs and isinstance(func, ast.Attribute):
            values, keywords = self.arguments(node)
            self.add(func.value, union([*values, *keywords.values()]))
            return on
        opaque = on.refs and not (on.made or on.tensor or on.listed or name.endswith("_"))
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
                return replace(value, none=True, some=cell in self.now.heap)
            return value
        if name == "zip":
            return union(values, each=Value(items=tuple(v.element() for v in values)))
        if name == "enumerate":
            pair = Value(items=(Value(), values[0].element()))
            return union(values, each=pair, optional=values[0].optional)
        if name in PLAIN:
            return Value(deps=union(values).deps)
        return values[0] if name in ("list", "tuple", "reversed") and len(values) == 1 else None

    def other(self, node: ast.Call, on: Value = Value()) -> Value:  # noqa: B008
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
            if name not in SETTINGS:
                self.change(
                    values[0], FILL if name in OVERWRITES and not zero else kind, given, node
                )
            return values[0]
        if is_method and name in SIZES:
            return Value(deps=every.deps)
        if is_method and name == "narrow" and len(values) > 2:
            self.slice(on, node)
            return on.part(ROWS if values[2].const == 0 else PART)
        if is_method and name == "items":
            return union([on], each=Value(items=(Value(), on.element())))
        if is_method and name in VIEWS:
            return replace(on, deps=every.deps)
        if name in ("Buffer", "Parameter", "ParameterList"):
            return replace(every, registered=name == "Buffer")
        if name[:1].isupper() or name in CONTAINERS:
            return every
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

    # Expressions

    def ev(self, node: ast.expr) -> Value:
        if self.state is None:
            return Value()
        return getattr(self, f"ev_{type(node).__name__}", self.ev_other)(node)

    def ev_other(self, node: ast.expr) -> Value:
        """Computed from its parts."""
        parts = [self.ev(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        self.use(union(parts))
        return union(parts).computed()

    def ev_Constant(self, node: ast.Constant) -> Value:
        return replace(NONE, unless=self.asked) if node.value is None else Value(const=node.value)

    def ev_Name(self, node: ast.Name) -> Value:
        owner = self.frames[-1].method.owner
        function = owner.module.functions.get(node.id)
        found = Value(method=(Method(owner, function), None)) if function else Value()
        return self.now.names.get(node.id, found)

    def ev_Attribute(self, node: ast.Attribute) -> Value:
        on = self.ev(node.value)
        if on.holds:
            return self.load(on.holds, node.attr)
        if node.attr in SIZES:
            return Value(deps=on.deps)
        return on.part(WHOLE) if on.refs else replace(on.part(WHOLE), made=frozenset())

    def ev_Subscript(self, node: ast.Subscript) -> Value:
        on = self.ev(node.value)
        found, copied = self.index(on, node.slice)
        return found.computed() if copied and on.refs else found

    def index(self, on: Value, key: ast.expr) -> tuple[Value, bool]:
        """A part, and whether reading it makes a copy."""
        extent, copied = WHOLE, False
        for part in key.elts if isinstance(key, ast.Tuple) else [key]:
            if isinstance(part, ast.Slice):
                lower = self.ev(part.lower).const if part.lower else 0
                upper = self.ev(part.upper).const if part.upper else None
                rows = PART if lower != 0 or upper not in (None, UNKNOWN) else ROWS
                extent = max(extent, rows if part.lower or part.upper else WHOLE)
                if rows == ROWS:
                    self.slice(on, key)
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

    def ev_IfExp(self, node: ast.IfExp) -> Value:
        return self.branch(node.test, lambda: self.ev(node.body), lambda: self.ev(node.orelse))

    def ev_BoolOp(self, node: ast.BoolOp) -> Value:
        return union(self.ev(value) for value in node.values)

    def ev_Compare(self, node: ast.Compare) -> Value:
        value = self.ev_other(node)
        plain = isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn))
        return Value(deps=value.deps) if plain else value

    def ev_Tuple(self, node: ast.Tuple | ast.List | ast.Dict) -> Value:
        parts = node.values if isinstance(node, ast.Dict) else node.elts
        items = tuple(self.ev(part) for part in parts)
        fixed = items and not isinstance(node, ast.Dict) and not any(map(is_star, parts))
        listed = not isinstance(node, ast.Tuple)
        return union(items, items=items if fixed else None, listed=listed)

    ev_List = ev_Dict = ev_Tuple

    def ev_ListComp(self, node: ast.ListComp | ast.DictComp) -> Value:
        for generator in node.generators:
            self.assign(generator.target, self.ev(generator.iter).element(), node)
        found = self.ev(node.value if isinstance(node, ast.DictComp) else node.elt)
        return union([found], listed=True)

    ev_GeneratorExp = ev_SetComp = ev_DictComp = ev_ListComp

    def ev_Starred(self, node: ast.Starred) -> Value:
        return self.ev(node.value)

    def string(self, node: ast.expr) -> str:
        """A name, with `*` for what varies."""
        if isinstance(node, ast.JoinedStr):
            return "".join(map(self.string, node.values))
        if isinstance(node, ast.BinOp):
            return self.string(node.left) + self.string(node.right)
        const = "*" if isinstance(node, ast.FormattedValue) else self.ev(node).const
        return const if isinstance(const, str) else "*"


def halves(
    function: ast.FunctionDef,
) -> tuple[list[ast.stmt], list[ast.stmt], ast.expr | None]:
    """What a context manager does before and after its `yield`, and what that gives."""
    body, before = list(function.body), list[ast.stmt]()
    while body:
        statement = body.pop(0)
        found = [part for part in ast.walk(statement) if isinstance(part, ast.Yield)]
        if found and isinstance(statement, ast.Try):
            body = [*statement.body, *statement.finalbody, *body]
        elif found:
            return before, body, found[0].value
        else:
            before.append(statement)
    return before, [], None


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_star(node: ast.expr) -> bool:
    return isinstance(node, ast.Starred)
