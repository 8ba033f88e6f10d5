"""What merging asks of a syntax tree: what a statement says, what it defines, what it is."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence

import libcst as cst

Statement = cst.BaseStatement


def source(node: cst.CSTNode) -> str:
    return textwrap.dedent(cst.Module([]).code_for_node(node)).strip()


def first_line(statement: Statement) -> str:
    return source(statement.with_changes(leading_lines=[])).partition("\n")[0]


def meaning(node: cst.CSTNode) -> str:
    """Equal for two nodes that differ in layout and comments only."""
    return ast.dump(ast.parse(source(node)))


def single(statement: cst.CSTNode) -> cst.BaseSmallStatement | None:
    """The small statement that has a line to itself."""
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        return statement.body[0]
    return None


def defined_name(statement: cst.CSTNode) -> str:
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
