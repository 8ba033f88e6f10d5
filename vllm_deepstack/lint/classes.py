"""Classes with what they inherit, across files. Nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ..cli import UserError

EMBED, FORWARD, INIT = "embed_input_ids", "forward", "__init__"
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
Function = ast.FunctionDef


@dataclass(frozen=True)
class Method:
    """A method as one class defines it."""

    owner: Class
    node: Function

    @property
    def file(self) -> Path:
        return self.owner.module.file

    @property
    def name(self) -> str:
        return self.node.name

    def is_a(self, *decorators: str) -> bool:
        """Whether a decorator ends in one of these names."""
        return any(ast.unparse(d).endswith(decorators) for d in self.node.decorator_list)


@dataclass(eq=False)
class Module:
    """A file, which is parsed when it is asked for."""

    file: Path
    text: str
    root: Path | None
    """The folder that `vllm.…` is imported from."""

    @cached_property
    def body(self) -> list[ast.stmt]:
        try:
            return ast.parse(self.text).body
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self.file}: does not parse: {error}") from None

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in self.body if isinstance(node, Function)}

    @cached_property
    def imports(self) -> dict[str, tuple[Path, str]]:
        """Where a name comes from, and what it is called there."""
        found = {}
        left = list(self.body)
        while left:
            node = left.pop()
            if isinstance(node, (ast.If, ast.Try)):
                left += [*node.body, *node.orelse]
            elif isinstance(node, ast.ImportFrom) and (folder := self.folder(node.level)):
                path = folder.joinpath(*(node.module or "").split("."))
                for alias in node.names:
                    found[alias.asname or alias.name] = path, alias.name
        return found

    def folder(self, level: int) -> Path | None:
        return self.file.parents[level - 1] if level else self.root


@dataclass(eq=False)
class Class:
    module: Module
    node: ast.ClassDef
    sibling: Callable[[str], Class | None]
    """A class that its file defines or imports, by its name there."""
    bases: list[Class] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def lineage(self) -> list[Class]:
        """Itself and its bases, nearest first."""
        found: dict[Class, None] = {self: None}
        for base in self.bases:
            found |= dict.fromkeys(base.lineage)
        return list(found)

    @cached_property
    def own(self) -> dict[str, Method | ast.expr]:
        """Its methods, of a property what reads it; and its attributes."""
        found: dict[str, Method | ast.expr] = {}
        for node in self.node.body:
            if isinstance(node, Function):
                found.setdefault(node.name, Method(self, node))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if node.value:
                    found[node.target.id] = node.value
        return found

    def member(self, name: str, after: Class | None = None) -> Method | ast.expr | None:
        """What `self.name` is; with `after`, `super().name` in a method of that class."""
        lineage = self.lineage
        if after is not None:
            lineage = lineage[lineage.index(after) + 1 :] if after in lineage else []
        found = next((cls.own[name] for cls in lineage if name in cls.own), None)
        if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name):
            other = next((c for c in lineage if name in c.own), self).sibling(found.value.id)
            return other.member(found.attr) if other else found
        return found

    def method(self, name: str, after: Class | None = None) -> Method | None:
        found = self.member(name, after)
        return found if isinstance(found, Method) else None

    def setter(self, name: str) -> Method | None:
        """What runs when a property is set."""
        for cls in self.lineage:
            for node in cls.node.body:
                if isinstance(node, Function) and node.name == name:
                    method = Method(cls, node)
                    if method.is_a(".setter"):
                        return method
            if name in cls.own and not isinstance(cls.own[name], Method):
                return None
        return None

    def reach(self, *names: str) -> list[Method]:
        """Methods that run when those run, but for `__init__`."""
        left = [found for name in names if (found := self.method(name))]
        seen: dict[Method, None] = {}
        while left:
            method = left.pop()
            if method in seen or method.name == INIT:
                continue
            seen[method] = None
            left += self.called(method, method.node)
        return list(seen)

    def called(self, method: Method, node: ast.AST) -> Iterator[Method]:
        """The class's own methods, and setters of its properties, that a part of a method calls."""
        for part in ast.walk(node):
            name = own_attribute(part)
            if name and isinstance(getattr(part, "ctx", None), ast.Store):
                found = self.setter(name)
            elif name:
                found = self.method(name)
            elif isinstance(part, ast.Attribute) and ast.unparse(part.value).startswith("super("):
                found = self.method(part.attr, after=method.owner)
            else:
                continue
            if found:
                yield found


class Files:
    """The classes of files, and of those that they import from.

    Raises:
        UserError: a path is not there, or a file does not parse.
    """

    def __init__(self, paths: Iterable[Path], vllm: Path | None):
        self.vllm = vllm
        self.modules: dict[Path, Module | None] = {}
        self.made: dict[tuple[Path, str], Class | None] = {}
        self.asked: list[Module] = []
        for path in paths:
            if not path.exists():
                raise UserError(f"{path}: no such file or folder")
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                if module := self.module(file.resolve()):
                    self.asked.append(module)

    def module(self, file: Path) -> Module | None:
        if file not in self.modules:
            try:
                text = file.read_text() if file.is_file() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: does not parse: {error}") from None
            root = next((p.parent for p in file.parents if p.name == "vllm"), self.vllm)
            self.modules[file] = None if text is None else Module(file, text, root)
        return self.modules[file]

    def find(self, file: Path, name: str) -> Class | None:
        """A class by the file that defines it, or that imports it. None: it is elsewhere."""
        if (file, name) in self.made:
            return self.made[file, name]
        self.made[file, name] = None  # a circle ends here
        module = self.module(file)
        if module is None:
            return None
        found = None
        if name in module.classes:
            found = Class(module, module.classes[name], partial(self.find, file))
            for base in found.node.bases:
                if isinstance(base, ast.Subscript):
                    base = base.value
                if isinstance(base, ast.Name) and (cls := self.find(file, base.id)):
                    found.bases.append(cls)
        elif name in module.imports:
            path, original = module.imports[name]
            found = self.find(path.with_suffix(".py"), original) or self.find(
                path / "__init__.py", original
            )
        self.made[file, name] = found
        return found

    def classes(self) -> Iterator[Class]:
        """Those of the files that were asked for which stage something: they, or what they
        inherit, have `embed_input_ids` and `forward`. Other files are not parsed."""
        family = self.family()
        for module in self.asked:
            if any(name in family for name in CLASS.findall(module.text)):
                for name in module.classes:
                    cls = self.find(module.file, name)
                    if cls and cls.method(EMBED) and cls.method(FORWARD):
                        yield cls

    def family(self) -> set[str]:
        """The names of classes that define `embed_input_ids`, and of those derived from them, by
        their text; and of those derived from models that were not asked for."""
        bases: dict[str, set[str]] = {}
        family = set()
        for module in self.asked:
            parts = re.split(r"^class (\w+)", module.text, flags=re.MULTILINE)
            for name, text in zip(parts[1::2], parts[2::2]):
                head = text.partition(":\n")[0]
                bases.setdefault(name, set()).update(re.findall(r"\w+", head))
                if f"def {EMBED}(" in text:
                    family.add(name)
        family |= {
            word
            for names in bases.values()
            for word in names - bases.keys()
            if word.endswith(("ForConditionalGeneration", "ForCausalLM", "Model", "Mixin"))
        }
        grown = True
        while grown:
            more = {name for name, names in bases.items() if names & family} - family
            family |= more
            grown = bool(more)
        return family


def own_attribute(node: ast.AST) -> str | None:
    """The name of `self.name`."""
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ):
        return node.attr
    return None
