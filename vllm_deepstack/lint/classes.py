"""Classes with what they inherit, across files. Nothing is imported."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ..cli import UserError

EMBED, FORWARD, INIT = "embed_input_ids", "forward", "__init__"
CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?", re.MULTILINE)
MODEL = re.compile(r"(ForConditionalGeneration|ForCausalLM|Model|Mixin)\b")
KNOWN = {"torch", *dir(builtins), *sys.stdlib_module_names}
"""Where classes are from that stage nothing."""
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

    def is_a(self, decorator: str) -> bool:
        return any(ast.unparse(d).endswith(decorator) for d in self.node.decorator_list)


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
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in self.body if isinstance(node, Function)}

    @cached_property
    def imports(self) -> dict[str, tuple[str, Path | None, str]]:
        """Of a name: the module that it comes from, where that is, and what it is called there."""
        found, left = dict[str, tuple[str, Path | None, str]](), list(self.body)
        while left:
            node = left.pop()
            if isinstance(node, (ast.If, ast.Try)):
                left += [*node.body, *node.orelse]
            elif isinstance(node, ast.ImportFrom):
                folder = self.file.parents[node.level - 1] if node.level else self.root
                path = folder and folder.joinpath(*(node.module or "").split("."))
                for alias in node.names:
                    module = "." * node.level + (node.module or "")
                    found[alias.asname or alias.name] = module, path, alias.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = ast.unparse(node.value)
                found[node.targets[0].id] = name, self.file, name  # another name for a class
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.partition(".")[0]] = alias.name, None, ""
        return found


@dataclass(eq=False)
class Class:
    module: Module
    node: ast.ClassDef
    sibling: Callable[[str], Class | None]
    """A class that its file defines or imports, by its name there."""
    bases: list[Class] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Bases that cannot be read."""

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
            match node:
                case ast.FunctionDef(name=name):
                    found.setdefault(name, Method(self, node))
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    found[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    found[name] = value
        return found

    def member(self, name: str, after: Class | None = None) -> Method | ast.expr | None:
        """What `self.name` is; with `after`, `super().name` in a method of that class."""
        lineage = self.lineage[self.lineage.index(after) + 1 if after else 0 :]
        cls = next((cls for cls in lineage if name in cls.own), self)
        match found := cls.own.get(name):
            case ast.Attribute(ast.Name(id=base), attr) if other := cls.sibling(base):
                return other.member(attr)
        return found

    def method(self, name: str, after: Class | None = None) -> Method | None:
        found = self.member(name, after)
        return found if isinstance(found, Method) else None

    def setter(self, name: str) -> Method | None:
        """What runs when a property is set."""
        cls = next((cls for cls in self.lineage if name in cls.own), self)
        methods = (Method(cls, node) for node in cls.node.body if isinstance(node, Function))
        return next((m for m in methods if m.name == name and m.is_a(".setter")), None)


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
        if (file, name) not in self.made:
            self.made[file, name] = None  # a circle ends here
            self.made[file, name] = self.look_for(file, name)
        return self.made[file, name]

    def look_for(self, file: Path, name: str) -> Class | None:
        module, (first, _, last) = self.module(file), name.partition(".")
        if module and first in module.classes:
            found = Class(module, module.classes[first], partial(self.find, file))
            for base in found.node.bases:
                text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
                root = text.partition(".")[0]
                if cls := self.find(file, text):
                    found.bases.append(cls)
                elif module.imports.get(root, (root,))[0].partition(".")[0] not in KNOWN:
                    found.missing.append(text)
            return found
        _, path, original = module.imports.get(first, ("", None, "")) if module else ("", None, "")
        if path and last:  # a module's
            path, original = path / original, last
        files = (path.with_suffix(".py"), path / "__init__.py") if path else ()
        return next((cls for found in files if (cls := self.find(found, original))), None)

    @cached_property
    def models(self) -> list[Class]:
        """Those of the files that were asked for which stage something: they, or what they
        inherit, have `embed_input_ids` and `forward`. Other files are not parsed."""
        found = [(m, name, bases) for m in self.asked for name, bases in CLASS.findall(m.text)]
        names = {name for _, name, _ in found}
        family = {name for m, name, _ in found if f"def {EMBED}(" in m.text}
        words = {name: set(re.findall(r"\w+", bases)) for _, name, bases in found}
        more = {n for n, w in words.items() if any(map(MODEL.search, w - names))} | family
        while more:  # what inherits those, and models of files that were not asked for
            family |= more
            more = {n for n, w in words.items() if w & family} - family
        modules = dict.fromkeys(m for m, name, _ in found if name in family)
        every = [self.find(module.file, name) for module in modules for name in module.classes]
        return [cls for cls in every if cls and cls.method(EMBED) and cls.method(FORWARD)]


def own_attribute(node: ast.AST) -> str | None:
    """The name of `self.name`."""
    match node:
        case ast.Attribute(ast.Name(id="self"), name):
            return name
    return None
