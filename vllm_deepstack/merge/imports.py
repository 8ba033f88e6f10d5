"""The imports that an overlay file needs and upstream's file lacks."""

from __future__ import annotations

from collections.abc import Set

import libcst as cst
from libcst.helpers import get_full_name_for_node

from ..cli import UserError
from .syntax import Statement, defined_name, is_docstring, leading_lines, single, source

Name = tuple[str, str, str]  # module, name in the module, name it is bound to


def add_imports(ours: list[Statement], theirs: list[Statement]) -> list[Statement]:
    """Adds what `theirs` does not import yet, in isort's order among its own kind.

    Raises:
        UserError: an import of `*`, or of a name that means something else upstream.
    """
    body = list(theirs)
    present = {name for s in theirs for name in imported(s)}
    bound = {name for _, _, name in present} | {defined_name(s) for s in theirs}
    for statement in ours:
        small = single(statement)
        if isinstance(small, cst.ImportFrom) and isinstance(small.names, cst.ImportStar):
            raise UserError(f"`{source(statement)}` cannot be merged: name what it imports")
        missing = [name for name in imported(statement) if name not in present]
        for _, _, name in missing:
            if name in bound:
                raise UserError(f"`{source(statement)}`: {name} is something else upstream")
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
    last of its package, else after the last of all."""
    package, module = sort_key(new)
    at = 1 if body and is_docstring(body[0]) else 0
    for i, statement in enumerate(body):
        if not imported(statement):
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
