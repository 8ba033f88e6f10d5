"""One overlay file, merged definition by definition into upstream's file of that name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath

import libcst as cst
from libcst.helpers import get_absolute_module_for_import
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from ..cli import UserError
from ..merged import NOTICE, path_of
from .imports import add_imports, bound, imported
from .splice import comparable, is_spliced, left_over, splice
from .syntax import (
    Statement,
    defined_name,
    first_line,
    is_docstring,
    is_ellipsis,
    leading_lines,
    meaning,
    single,
    source,
    statements,
    with_statements,
)

# `# release: <0.23` on the line above a definition: only releases in this range need it.
RELEASE = re.compile(r"#\s*release:\s*(.*)")
SPDX = b"# SPDX-"


def merge(
    ours: bytes, theirs: bytes, *, path: str, release: Version, overlay: Mapping[str, bytes]
) -> bytes:
    """Returns upstream's file `theirs` with the definitions of the overlay's file `ours`.

    `path` is where the file lies (`vllm/…/qwen3_vl.py`); `overlay` has all the overlay's
    files by path, to tell which base classes the fork provides.

    Raises:
        UserError: a definition, anchor or signature does not fit this release.
    """
    merger = _Merger(path, release, overlay)
    module = merger.parse(theirs, "upstream's file")
    merged = merger.module(merger.parse(ours, "the overlay's file"), module)
    return theirs if merged is module else merged.bytes


def merge_all(
    overlay: Mapping[str, bytes], upstream: Mapping[str, bytes | None], release: Version
) -> dict[str, bytes]:
    """The overlay's files by path, merged with those of upstream, that a release needs.

    Raises:
        UserError: as `merge`.
    """
    try:
        return {
            path: merged_file(ours, upstream.get(path), path=path, release=release, overlay=overlay)
            for path, ours in overlay.items()
            if is_needed(ours, path=path, release=release)
        }
    finally:  # what is kept for the next file
        parsed.cache_clear()
        comparable.cache_clear()


def added(ours: bytes, *, path: str, release: Version) -> bytes:
    """Returns an overlay file that upstream does not have, as it is.

    Raises:
        UserError: it is a difference from a file of upstream's.
    """
    merger = _Merger(path, release, {})
    for statement in merger.parse(ours, "the overlay's file").body:
        if left := left_over(statement):
            problem = f"upstream has no such file for {left} to stand for"
            raise merger.error(defined_name(statement), problem)
    return ours


def merged_file(
    ours: bytes, theirs: bytes | None, *, path: str, release: Version, overlay: Mapping[str, bytes]
) -> bytes:
    """What an overlay's file makes of upstream's; None: there is none. What is changed says so, as
    Apache-2.0, 4b, asks.

    Raises:
        UserError: the overlay does not fit, or what comes out is no Python.
    """
    if theirs is None:
        return added(ours, path=path, release=release)
    after = merge(ours, theirs, path=path, release=release, overlay=overlay)
    if after == theirs or NOTICE in theirs:
        return after
    lines = after.splitlines(keepends=True)
    at = next((i for i, line in enumerate(lines) if not line.startswith(SPDX)), len(lines))
    return b"".join([*lines[:at], NOTICE, *lines[at:]])


def is_needed(ours: bytes, *, path: str, release: Version) -> bool:
    """Whether a release needs an overlay file, by a `# release:` above the file's docstring.

    Raises:
        UserError: that is not a version specifier.
    """
    merger = _Merger(path, release, {})
    module = merger.parse(ours, "the overlay's file")
    return not (module.body and is_docstring(module.body[0])) or all(
        merger.fits(specifier, "module") for _, specifier in specifiers(module.header)
    )


def specifiers(lines: Sequence[cst.EmptyLine]) -> list[tuple[cst.EmptyLine, str]]:
    """The comments that say which releases need what is below them, and what they say."""
    return [
        (line, match[1])
        for line in lines
        if line.comment and (match := RELEASE.match(line.comment.value))
    ]


@dataclass
class _Merger:
    path: str
    release: Version
    overlay: Mapping[str, bytes]
    provided: dict[str, Set[str]] = field(default_factory=dict)

    def error(self, definition: str, problem: object) -> UserError:
        return UserError(f"{self.path}: {definition}: {problem} (vLLM {self.release})")

    def parse(self, text: bytes, what: str) -> cst.Module:
        try:
            return parsed(text)
        except cst.ParserSyntaxError as error:  # which quotes the line
            raise self.error(what, f"does not parse: line {error.raw_line}") from None
        except UnicodeDecodeError as error:
            raise self.error(what, f"does not parse: {error}") from None

    def module(self, ours: cst.Module, theirs: cst.Module) -> cst.Module:
        self.provided = self.bases_of_the_fork(ours)
        wanted = self.wanted(with_header(ours), "module")
        imports = [s for s in wanted if isinstance(single(s), (cst.Import, cst.ImportFrom))]
        body = self.members([s for s in wanted if s not in imports], list(theirs.body), "")
        try:
            body = add_imports(imports, body)
        except UserError as error:
            raise self.error("imports", error) from None
        return theirs if body == list(theirs.body) else theirs.with_changes(body=body)

    def wanted(self, body: Iterable[Statement], where: str) -> list[Statement]:
        """Those that this release needs, without the comments that say so."""
        kept = []
        for statement in body:
            if is_docstring(statement):
                continue
            for line, specifier in specifiers(leading_lines(statement)):
                if not self.fits(specifier, defined_name(statement) or where):
                    break
                statement = statement.deep_remove(line)  # type: ignore[assignment]
            else:
                kept.append(statement)
        return kept

    def fits(self, specifier: str, where: str) -> bool:
        try:
            return SpecifierSet(specifier).contains(self.release, prereleases=True)
        except InvalidSpecifier:
            problem = f"`# release: {specifier}` is not a version specifier"
            raise self.error(where, problem) from None

    def members(
        self, ours: list[Statement], theirs: list[Statement], owner: str
    ) -> list[Statement]:
        """Merges the definitions of a module (`owner` is empty) or of a class.

        A new one comes before the definition that follows it in the overlay, or last.
        """
        body = list(theirs)
        following: str | None = None
        for statement in reversed(ours):
            name = defined_name(statement)
            definition = f"{owner}.{name}" if owner else name
            if not name:
                raise self.error(
                    owner or "module",
                    f"`{source(statement)}` is not a definition: it cannot be merged",
                )
            found = [i for i, other in enumerate(body) if name in bound(other)]
            if len(found) > 1:
                raise self.error(definition, f"upstream defines it {len(found)} times")
            if found:
                body[found[0]] = self.definition(statement, body[found[0]], definition)
            else:
                if left := left_over(statement):
                    problem = f"upstream has no such definition for {left} to stand for"
                    raise self.error(definition, problem)
                at = next(
                    (i for i, s in enumerate(body) if defined_name(s) == following), len(body)
                )
                body.insert(at, spaced(statement, 1 if owner else 2))
            following = name
        return body

    def definition(self, ours: Statement, theirs: Statement, name: str) -> Statement:
        if imported(theirs):
            raise self.error(name, "upstream imports it instead of defining it")
        if not defined_name(theirs):
            raise self.error(name, f"upstream defines it in another way: `{first_line(theirs)}`")
        if type(ours) is not type(theirs):
            raise self.error(name, "upstream's is another kind of definition")
        if isinstance(ours, cst.ClassDef) and isinstance(theirs, cst.ClassDef):
            return self.merge_class(ours, theirs, name)
        if isinstance(ours, cst.FunctionDef) and is_spliced(ours):
            assert isinstance(theirs, cst.FunctionDef)
            try:
                return splice(ours, theirs)
            except UserError as error:
                raise self.error(name, error) from None
        if meaning(ours) == meaning(theirs):
            return theirs
        if left := left_over(ours):
            raise self.error(name, f"upstream has nothing for {left} to stand for")
        comments = [line for line in leading_lines(ours) if line.comment]
        blank = [line for line in leading_lines(theirs) if not line.comment]
        return ours.with_changes(leading_lines=[*blank, *comments])

    def merge_class(self, ours: cst.ClassDef, theirs: cst.ClassDef, name: str) -> cst.ClassDef:
        if ours.keywords or ours.decorators:
            raise self.error(name, "keywords and decorators of a class cannot be merged")
        members = [s for s in self.wanted(statements(ours.body), name) if not is_ellipsis(s)]
        kept = {defined_name(s) for s in members}
        taken_over = {
            method
            for base in ours.bases
            for method in self.provided.get(source(base.value), ())
            if method not in kept
        }
        old, body = statements(theirs.body), []
        for statement in old:
            if not (shadows := taken_over & bound(statement)):
                body.append(statement)
            elif not isinstance(statement, cst.FunctionDef):
                problem = f"upstream defines it in another way: `{first_line(statement)}`"
                raise self.error(f"{name}.{min(shadows)}", problem)
        body = self.members(members, body, name)
        merged = with_bases(theirs, ours.bases)
        if body == old:
            return merged
        body = body or [cst.SimpleStatementLine([cst.Pass()])]
        return merged.with_changes(body=with_statements(theirs.body, body))

    def bases_of_the_fork(self, module: cst.Module) -> dict[str, Set[str]]:
        """The methods of each class that this file imports from another overlay file."""
        found: dict[str, Set[str]] = {}
        here = ".".join(PurePosixPath(self.path).with_suffix("").parts)
        for statement in module.body:
            small = single(statement)
            if not isinstance(small, cst.ImportFrom) or isinstance(small.names, cst.ImportStar):
                continue
            source_module = get_absolute_module_for_import(here, small) or ""
            path = path_of(source_module)
            if path not in self.overlay:
                continue
            classes = {
                s.name.value: s
                for s in parsed(self.overlay[path]).body
                if isinstance(s, cst.ClassDef)
            }
            for _, original, name in imported(statement):
                if original in classes:
                    found[name] = {
                        s.name.value
                        for s in classes[original].body.body
                        if isinstance(s, cst.FunctionDef)
                    }
        return found


@lru_cache
def parsed(text: bytes) -> cst.Module:
    """A module of LibCST's, which cannot be changed: an overlay file is asked for several times."""
    return cst.parse_module(text)


def with_header(module: cst.Module) -> Sequence[Statement]:
    """The module's statements, the first with the comments that stand right above it."""
    comments: list[cst.EmptyLine] = []
    for line in module.header:
        comments = [*comments, line] if line.comment else []
    if not module.body or not hasattr(module.body[0], "leading_lines"):
        return module.body
    first = module.body[0].with_changes(leading_lines=[*comments, *leading_lines(module.body[0])])
    return [first, *module.body[1:]]


def with_bases(theirs: cst.ClassDef, ours: Sequence[cst.Arg]) -> cst.ClassDef:
    present = {source(base.value) for base in theirs.bases}
    missing = [base for base in ours if source(base.value) not in present]
    if not missing:
        return theirs
    rest = [*theirs.bases, *theirs.keywords]
    lpar = theirs.lpar if isinstance(theirs.lpar, cst.LeftParen) else cst.LeftParen()
    rpar = theirs.rpar if isinstance(theirs.rpar, cst.RightParen) else cst.RightParen()
    between = lpar.whitespace_after
    if isinstance(between, cst.SimpleWhitespace):
        between = cst.SimpleWhitespace(" ")
    new = [
        cst.Arg(base.value, comma=cst.Comma(whitespace_after=between))
        if rest or base is not missing[-1]
        else cst.Arg(base.value)
        for base in missing
    ]
    return theirs.with_changes(bases=[*new, *theirs.bases], lpar=lpar, rpar=rpar)


def spaced(statement: Statement, blank: int) -> Statement:
    """A definition with the blank lines that belong before it."""
    if not isinstance(statement, (cst.FunctionDef, cst.ClassDef)):
        return statement
    comments = [line for line in leading_lines(statement) if line.comment]
    lines = [cst.EmptyLine(indent=False)] * blank
    return statement.with_changes(leading_lines=[*lines, *comments])
