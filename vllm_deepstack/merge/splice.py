"""A method's body, written as its difference from upstream's."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from typing import Any

import libcst as cst
import libcst.matchers as m

from ..cli import UserError
from .syntax import (
    Statement,
    first_line,
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
ANCHOR = re.compile(r"#\s*anchor\s*(?:$|[:#])")
MARK = re.compile(r"#\s*(?:anchor|remove)\s*(?:$|[:#])")
MARKS = m.Expr(m.Ellipsis()) | m.Comment(m.MatchIfTrue(lambda text: bool(MARK.match(text))))


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


def marked(statement: Statement) -> bool:
    """Whether `# anchor` stands at the end of a statement's first line, or above it."""
    above = [line.comment.value for line in leading_lines(statement) if line.comment]
    return any(map(ANCHOR.match, above)) or bool(ANCHOR.search(first_line(statement)))


def left_over(statement: Statement) -> str:
    """The first `...`, `# anchor` or `# remove` in new code, where there is none of upstream's."""
    found = m.findall(statement, MARKS)
    return f"`{source(found[0])}` in `{first_line(statement)}`" if found else ""


def is_spliced(node: cst.CSTNode) -> bool:
    """Whether a function's or a block's statements are a difference from upstream's."""
    if not isinstance(node, (cst.FunctionDef, cst.Else, *BLOCKS)):
        return False
    other = getattr(node, "orelse", None)
    return any(is_ellipsis(s) or is_anchor(s) for s in statements(node.body)) or (
        other is not None and is_spliced(other)
    )


def is_anchor(statement: Statement) -> bool:
    return marked(statement) or removed(statement) is not None or is_spliced(statement)


def splice(ours: Function, theirs: Function) -> Function:
    """Puts `ours` around and between the statements of `theirs`.

    `...` stands for statements of upstream; one that is marked `# anchor` is upstream's, too, and
    says where between them the new ones go. One that is marked `# remove` goes. A block (`if`,
    `for`, `while`, `with`) that has any of these in it is the anchor of upstream's block with the
    same first line, and spliced like a body; so are the `elif` and `else` that are written
    after it. A docstring in `ours` is for the overlay's reader. What is to go, and nothing comes
    for it, may be gone already: that looks as it does once it is merged.

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
        UserError: the signatures differ, an anchor is missing or ambiguous, or has no mark.
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
        elif first == last:
            raise UserError(
                "between two `...`, or where there is none, there has to be an anchor, to say where"
                + "".join(f"; `{source(s)}` is not marked" for s in group)
            )
        elif last:
            body += theirs[done:]
        for i, statement in enumerate(group):
            if i not in anchors:
                body.append(statement)
            elif not removed(statement):
                anchor = theirs[anchors[i]]
                body.append(_inside(statement, anchor) if is_spliced(statement) else anchor)
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
    """Upstream's block, or its `else`, with what goes into it."""
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
    """Where upstream has an anchor; None for a new statement.

    Raises:
        UserError: not exactly once; or it has a statement that is not marked.
    """
    wanted = _anchor(statement, statement)
    found = [i for i, other in enumerate(theirs) if _anchor(other, statement) == wanted]
    if not is_anchor(statement):
        if found:
            raise UserError(
                f"upstream has this statement already: mark it `# anchor`, or leave out `{wanted}`"
            )
        if left := left_over(statement):
            raise UserError(f"upstream has nothing for {left} to stand for")
        return None
    if len(found) > 1:
        raise UserError(f"upstream has the anchor `{wanted}` {len(found)} times")
    if not found:
        raise UserError(f"upstream has no `{wanted}`")
    return found[0]


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
    if not _merged(statements(ours.body), statements(theirs.body)):
        return False
    other, orelse = getattr(ours, "orelse", None), getattr(theirs, "orelse", None)
    return other is None or (type(other) is type(orelse) and _merged_inside(other, orelse))
