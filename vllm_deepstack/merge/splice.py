"""A method's body, written as its difference from upstream's."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from typing import Any

import libcst as cst

from ..cli import UserError
from .syntax import (
    Statement,
    is_docstring,
    is_ellipsis,
    leading_lines,
    source,
    statements,
    with_statements,
)

Function = cst.FunctionDef
BLOCKS = (cst.If, cst.For, cst.While, cst.With)
REMOVE = re.compile(r"#\s*remove\b")


def removed(statement: Statement) -> cst.EmptyLine | None:
    """The comment that marks a statement of upstream's to go: `# remove`, and why."""
    return next(
        (
            line
            for line in leading_lines(statement)
            if line.comment and REMOVE.match(line.comment.value)
        ),
        None,
    )


def is_spliced(node: cst.CSTNode) -> bool:
    """Whether a function's or a block's statements are a difference from upstream's."""
    if not isinstance(node, (cst.FunctionDef, cst.Else, *BLOCKS)):
        return False
    other = getattr(node, "orelse", None)
    return any(is_ellipsis(s) or removed(s) or is_spliced(s) for s in statements(node.body)) or (
        other is not None and is_spliced(other)
    )


def splice(ours: Function, theirs: Function) -> Function:
    """Puts `ours` around and between the statements of `theirs`.

    `...` stands for statements of upstream; a statement equal to one of upstream's is an
    anchor and says where between them the new ones go. An anchor marked `# remove` goes. A
    block (`if`, `for`, `while`, `with`) that has any of these in it is the anchor of upstream's
    block with the same first line, and spliced like a body; so are the `elif` and `else` that are
    written after it. A docstring in `ours` is for the overlay's reader. What is to go, and nothing
    comes for it, may be gone already: that looks as it does once it is merged.

        ours                      theirs                 merged
        a = 0                     x = f()                a = 0
        ...                       if x:                  x = f()
        if x:                         y = g(x)           if x:
            # remove: b knows         return y               z = b(x)
            y = g(x)              return x                   return y
            z = b(x)                                     return x
            ...
        ...

    Raises:
        UserError: the signatures differ, or an anchor is missing or ambiguous.
    """
    if _signature(ours) != _signature(theirs):
        raise UserError(
            f"its signature is `{_signature(ours)}`, upstream's is `{_signature(theirs)}`"
        )
    old = statements(theirs.body)
    docstring = old[:1] if is_docstring(old[0]) else []
    pattern = statements(ours.body)[1 if is_docstring(statements(ours.body)[0]) else 0 :]
    body = _splice(pattern, old[len(docstring) :])
    return theirs.with_changes(body=with_statements(theirs.body, [*docstring, *body]))


def _signature(function: Function) -> str:
    tree = ast.parse(source(function)).body[0]
    assert isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
    for argument in ast.walk(tree.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    decorators = "".join(f"@{ast.unparse(d)} " for d in tree.decorator_list)
    kind = "async def" if function.asynchronous else "def"
    return f"{decorators}{kind} ({ast.unparse(tree.args)})"


def _splice(pattern: list[Statement], theirs: list[Statement]) -> list[Statement]:
    if _merged(pattern, theirs):
        return theirs
    groups: list[list[Statement]] = [[]]
    for statement in pattern:
        if is_ellipsis(statement):
            groups.append([])
        else:
            groups[-1].append(statement)
    body: list[Statement] = []
    done = 0
    for group in groups:
        anchors = {i: at for i, s in enumerate(group) if (at := _find(s, theirs)) is not None}
        found = list(anchors.values())
        first, last = group is groups[0], group is groups[-1]
        if found:
            start = 0 if first else found[0]
            end = len(theirs) if last else found[-1] + 1
            if found != list(range(start, end)) or start < done:
                raise UserError(
                    f"around `{source(theirs[found[0]])}` upstream has other statements, or "
                    "the same in another order: write `...` for those the overlay leaves out"
                )
            body += theirs[done:start]
            done = end
        elif last:
            body += theirs[done:]
        elif not first:
            raise UserError(
                "between two `...` there has to be a statement of upstream's, to say where; "
                "upstream has no " + (" and no ".join(f"`{source(s)}`" for s in group) or "such")
            )
        for i, statement in enumerate(group):
            if i not in anchors:
                body.append(statement)
            elif not removed(statement):
                body.append(_inside(statement, theirs[anchors[i]]))
    return body


def _merged(pattern: list[Statement], theirs: list[Statement]) -> bool:
    """Whether that was done before: what is to go has gone, and the rest is there."""
    for statement in pattern:
        if removed(statement) and any(
            _anchor(other, statement) == _anchor(statement, statement) for other in theirs
        ):
            return False
    return _matches([s for s in pattern if not removed(s)], theirs)


def _inside(ours: Any, theirs: Any) -> Any:
    """An anchor as it is upstream, with what goes into it if it is a block; or an `else`."""
    if not is_spliced(ours):
        return theirs
    merged: Any = theirs
    old = statements(merged.body)
    if (body := _splice(statements(ours.body), old)) != old:
        merged = merged.with_changes(body=with_statements(merged.body, body))
    if (other := getattr(ours, "orelse", None)) is None:
        return merged
    orelse = merged.orelse
    if type(orelse) is not type(other) or (
        isinstance(other, cst.If) and comparable(other, True) != comparable(orelse, True)
    ):
        raise UserError(f"upstream's `{source(ours)}` goes on differently")
    return merged.with_changes(orelse=_inside(other, orelse))


def _find(statement: Statement, theirs: list[Statement]) -> int | None:
    """Where upstream has a statement.

    Raises:
        UserError: more than once, or not at all though it has to.
    """
    wanted = _anchor(statement, statement)
    found = [i for i, other in enumerate(theirs) if _anchor(other, statement) == wanted]
    if len(found) > 1:
        raise UserError(f"upstream has the anchor `{wanted}` {len(found)} times")
    if not found and (removed(statement) or is_spliced(statement)):
        raise UserError(f"upstream has no `{wanted}`")
    return found[0] if found else None


def _anchor(statement: Statement, ours: Statement) -> str:
    """What has to be equal: of a block that is spliced its first line, else all of it."""
    return comparable(statement, isinstance(statement, BLOCKS) and is_spliced(ours))


@lru_cache(1000)  # upstream's statements are compared with each of the overlay's
def comparable(statement: Statement, first_line: bool) -> str:
    if first_line:
        changes = {"orelse": None} if hasattr(statement, "orelse") else {}
        body = cst.IndentedBlock([cst.SimpleStatementLine([cst.Pass()])])
        statement = statement.with_changes(body=body, leading_lines=[], **changes)
    return ast.unparse(ast.parse(source(statement)))


def _matches(pattern: list[Statement], theirs: list[Statement]) -> bool:
    """Whether the pattern describes all the statements."""
    if not pattern:
        return not theirs
    head, rest = pattern[0], pattern[1:]
    if is_ellipsis(head):
        return any(_matches(rest, theirs[i:]) for i in range(len(theirs) + 1))
    if not theirs or _anchor(head, head) != _anchor(theirs[0], head):
        return False
    if is_spliced(head) and not _merged_inside(head, theirs[0]):
        return False
    return _matches(rest, theirs[1:])


def _merged_inside(ours: Any, theirs: Any) -> bool:
    if is_spliced(ours) and not _merged(statements(ours.body), statements(theirs.body)):
        return False
    other, orelse = getattr(ours, "orelse", None), getattr(theirs, "orelse", None)
    return other is None or (type(other) is type(orelse) and _merged_inside(other, orelse))
