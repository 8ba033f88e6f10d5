"""The imports that an overlay file needs and upstream's file lacks."""

from __future__ import annotations

import ast
from collections.abc import Set
from symtable import symtable

import libcst as cst
from libcst.helpers import get_full_name_for_node

from ..cli import UserError
from .syntax import (
    Statement,
    defined_name,
    first_line,
    is_docstring,
    leading_lines,
    single,
    source,
)

Name = tuple[str, str, str]  # module, name in the module, name it is bound to


def add_imports(ours: list[Statement], theirs: list[Statement]) -> list[Statement]:
    """Adds what `theirs` does not import yet, in isort's order among its own kind.

    Raises:
        UserError: an import of `*`, or of a name that is bound in another way in `theirs`.
    """
    body = list(theirs)
    present = {name for s in theirs for name in imported(s)}
    taken = {name: s for s in theirs for name in bound(s)}
    for statement in ours:
        small = single(statement)
        if isinstance(small, cst.ImportFrom) and isinstance(small.names, cst.ImportStar):
            raise UserError(f"`{source(statement)}` cannot be merged: name what it imports")
        missing = [name for name in imported(statement) if name not in present]
        for _, _, name in missing:
            if name in taken:
                problem = f"{name} is something else upstream: `{first_line(taken[name])}`"
                raise UserError(f"`{source(statement)}`: {problem}")
        if missing:
            insert(only(statement, set(missing)), body)
    return body


def imported(statement: Statement) -> list[Name]:
    """What an import statement binds; nothing for any other statement."""
    small = single(statement)
    if not isinstance(small, (cst.Import, cst.ImportFrom)) or isinstance(
        small.names, cst.ImportStar
    ):
        return []
    return [
        (module_of(small), alias.evaluated_name, alias.evaluated_alias or alias.evaluated_name)
        for alias in small.names
    ]


def bound(statement: Statement) -> Set[str]:
    """The names that a statement binds, also in a tuple, or below `if`, `for` or `try`."""
    if names := imported(statement):
        return {name for _, _, name in names}
    if name := defined_name(statement):
        return {name}
    symbols = symtable(source(statement), "", "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


def uses(statement: Statement, names: Set[str]) -> bool:
    """Whether it names one of them; in a function, too, which may be called before the next."""
    nodes = ast.walk(ast.parse(source(statement)))
    return any(isinstance(node, ast.Name) and node.id in names for node in nodes)


def module_of(small: cst.Import | cst.ImportFrom) -> str:
    if isinstance(small, cst.Import):
        return ""
    name = get_full_name_for_node(small.module) if small.module else ""
    return "." * len(small.relative) + (name or "")


def only(statement: Statement, wanted: Set[Name]) -> Statement:
    """The import statement without the names that are not wanted."""
    small = single(statement)
    assert isinstance(small, (cst.Import, cst.ImportFrom))
    assert not isinstance(small.names, cst.ImportStar)
    kept = [alias for name, alias in zip(imported(statement), small.names) if name in wanted]
    if len(kept) == len(small.names):
        return statement
    kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return statement.with_changes(body=[small.with_changes(names=kept)])


def insert(new: Statement, body: list[Statement]) -> None:
    """Puts an import before the first of its package that sorts after it, else after the
    last of its package, else after the last of all; of those above what uses it."""
    package, module = sort_key(new)
    names = {name.partition(".")[0] for name in bound(new)}
    last = max((i for i, s in enumerate(body) if imported(s)), default=-1)
    at = 1 if body and is_docstring(body[0]) else 0
    for i, statement in enumerate(body[: last + 1]):
        if not imported(statement):
            if uses(statement, names):
                break
            continue
        other_package, other = sort_key(statement)
        if other_package == package and other > module:
            # The blank lines that part the package from others stay in front of it.
            blank = [line for line in leading_lines(statement) if not line.comment]
            rest = [line for line in leading_lines(statement) if line.comment]
            body[i : i + 1] = [
                new.with_changes(leading_lines=blank),
                statement.with_changes(leading_lines=rest),
            ]
            return
        if other_package == package or not any(
            sort_key(s)[0] == package for s in body[:i] if imported(s)
        ):
            at = i + 1
    body.insert(at, new.with_changes(leading_lines=[]))


def sort_key(statement: Statement) -> tuple[str, str]:
    module, name, _ = imported(statement)[0]
    full = module or name
    return ("." if full.startswith(".") else full.split(".")[0]), full
