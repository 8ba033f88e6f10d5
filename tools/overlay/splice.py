"""A method's body, written as its difference from upstream's."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence

import libcst as cst

from . import OverlayError

Function = cst.FunctionDef
Statement = cst.BaseStatement


def source(node: cst.CSTNode) -> str:
    return textwrap.dedent(cst.Module([]).code_for_node(node)).strip()


def meaning(node: cst.CSTNode) -> str:
    """Equal for two nodes that differ in layout and comments only."""
    return ast.dump(ast.parse(source(node)))


def single(statement: cst.CSTNode) -> cst.BaseSmallStatement | None:
    """The small statement that has a line to itself."""
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        return statement.body[0]
    return None


def names(statement: cst.CSTNode) -> str:
    """What a statement defines: a function, a class or a variable. Empty if none."""
    if isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
        return statement.name.value
    small = single(statement)
    target: cst.CSTNode | None = None
    if isinstance(small, cst.AnnAssign):
        target = small.target
    elif isinstance(small, cst.Assign) and len(small.targets) == 1:
        target = small.targets[0].target
    return target.value if isinstance(target, cst.Name) else ""


def leading_lines(statement: Statement) -> Sequence[cst.EmptyLine]:
    return getattr(statement, "leading_lines", ())


def is_ellipsis(statement: cst.CSTNode) -> bool:
    small = single(statement)
    return isinstance(small, cst.Expr) and isinstance(small.value, cst.Ellipsis)


def is_docstring(statement: cst.CSTNode) -> bool:
    small = single(statement)
    return isinstance(small, cst.Expr) and isinstance(
        small.value, (cst.SimpleString, cst.ConcatenatedString)
    )


def statements(suite: cst.BaseSuite) -> list[Statement]:
    """The suite's statements; those on the line of its `def` or `class`, a line each."""
    return [
        s
        if isinstance(s, cst.BaseStatement)
        else cst.SimpleStatementLine([s.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])
        for s in suite.body
    ]


def with_statements(suite: cst.BaseSuite, body: Sequence[Statement]) -> cst.BaseSuite:
    if isinstance(suite, cst.IndentedBlock):
        return suite.with_changes(body=body)
    return cst.IndentedBlock(body)


def is_spliced(function: Function) -> bool:
    return any(map(is_ellipsis, statements(function.body)))


def splice(ours: Function, theirs: Function) -> Function:
    """Puts `ours` around and between the statements of `theirs`.

    `...` stands for statements of upstream; a statement equal to one of upstream's is an
    anchor and says where between them the new ones go. A docstring in `ours` is for the
    overlay's reader.

    Raises:
        OverlayError: the signatures differ, or an anchor is missing or ambiguous.
    """
    if _signature(ours) != _signature(theirs):
        raise OverlayError(
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
    meanings = [meaning(s) for s in theirs]
    if _matches([None if is_ellipsis(s) else meaning(s) for s in pattern], meanings):
        return theirs  # merged before
    groups: list[list[Statement]] = [[]]
    for statement in pattern:
        if is_ellipsis(statement):
            groups.append([])
        else:
            groups[-1].append(statement)
    body: list[Statement] = []
    done = 0
    for group in groups:
        anchors = {i: at for i, s in enumerate(group) if (at := _find(s, meanings)) is not None}
        found = list(anchors.values())
        first, last = group is groups[0], group is groups[-1]
        if found:
            start = 0 if first else found[0]
            end = len(theirs) if last else found[-1] + 1
            if found != list(range(start, end)) or start < done:
                raise OverlayError(
                    f"around `{source(theirs[found[0]])}` upstream has other statements, or "
                    "the same in another order: write `...` for those the overlay leaves out"
                )
            body += theirs[done:start]
            done = end
        elif last:
            body += theirs[done:]
        elif not first:
            raise OverlayError(
                "between two `...` there has to be a statement of upstream's, to say where; "
                "upstream has no " + (" and no ".join(f"`{source(s)}`" for s in group) or "such")
            )
        body += [theirs[anchors[i]] if i in anchors else s for i, s in enumerate(group)]
    return body


def _find(statement: Statement, meanings: list[str]) -> int | None:
    count = meanings.count(meaning(statement))
    if count > 1:
        raise OverlayError(f"upstream has the anchor `{source(statement)}` {count} times")
    return meanings.index(meaning(statement)) if count else None


def _matches(pattern: list[str | None], meanings: list[str]) -> bool:
    """Whether the pattern describes all the statements; None stands for any of them."""
    if not pattern:
        return not meanings
    head, rest = pattern[0], pattern[1:]
    if head is None:
        return any(_matches(rest, meanings[i:]) for i in range(len(meanings) + 1))
    return meanings[:1] == [head] and _matches(rest, meanings[1:])
