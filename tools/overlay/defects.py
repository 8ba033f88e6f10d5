"""Which of the defects a tree's code has, read from the code: nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

MODELS = "vllm/model_executor/models"
CLASSES = {
    "qwen3_vl.py": "Qwen3VLForConditionalGeneration",
    "qwen3_omni_moe_thinker.py": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
MIXIN = "deepstack.py", "DeepStackMixin"
GET, SET, CLEAR, RESIZE, MOVE, STAGE = (
    f"_{verb}_deepstack_input_embeds" for verb in ("get", "set", "clear", "resize", "move", "stage")
)
BUFFERS = "deepstack_input_embeds"
COUNT = "deepstack_input_embeds_num_tokens"


class Unreadable(Exception):
    """The code is not laid out as in any release that the rules were made for."""


class Model:
    """A class's methods, with those of the fork's or another mixin that stands beside it."""

    def __init__(self, models: Path, file: str, name: str):
        self.methods: dict[str, ast.FunctionDef] = {}
        cls = definition(models / file, name)
        bases = [base.id for base in cls.bases if isinstance(base, ast.Name)]
        beside = models / MIXIN[0]
        if beside.is_file():
            for node in parse(beside).body:
                if isinstance(node, ast.ClassDef) and node.name in bases:
                    self.add(node)
        self.add(cls)
        for method in (GET, SET, CLEAR, "embed_input_ids", "forward", "__init__"):
            if method not in self.methods:
                raise Unreadable(f"{models / file}: {name} has no {method}")

    def add(self, cls: ast.ClassDef) -> None:
        self.methods |= {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}

    def calls(self, method: str, *called: str) -> bool:
        """Whether a method calls one of the others, itself or through methods of the class."""
        seen, left = set(), [method]
        while left:
            node = self.methods.get(left.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            left += names(node)
        return bool((seen - {method}) & set(called))

    def mentions(self, method: str, *words: str) -> bool:
        node = self.methods.get(method)
        return node is not None and not set(words).isdisjoint(names(node))


def parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text())
    except FileNotFoundError:
        raise Unreadable(f"{file}: missing") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise Unreadable(f"{file}: {error}") from None


def definition(file: Path, name: str) -> ast.ClassDef:
    for node in parse(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise Unreadable(f"{file}: has no class {name}")


def names(node: ast.AST) -> Iterator[str]:
    """Names, attributes, keywords and texts in a piece of code; docstrings, too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.keyword) and part.arg:
            yield part.arg
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def specialises(model: Model) -> bool:
    """Reading gives `None` while nothing is staged."""
    return any(
        isinstance(node, ast.If) and COUNT in names(node.test) and returns_none(node)
        for node in ast.walk(model.methods[GET])
    )


def returns_none(node: ast.If) -> bool:
    return any(
        isinstance(part, ast.Return)
        and (part.value is None or (isinstance(part.value, ast.Constant) and not part.value.value))
        for part in node.body
    )


def outlives(model: Model) -> bool:
    return not specialises(model) and not model.calls("embed_input_ids", CLEAR)


def takes_meta(model: Model) -> bool:
    guarded = any(model.mentions(method, "is_meta") for method in model.methods)
    return not (specialises(model) or guarded or model.mentions("__init__", "StageMissingLayer"))


def growing_drops(model: Model) -> bool:
    return model.calls(GET, RESIZE) and not model.mentions(RESIZE, "pad", "copy_", "cat")


def growing_strands(model: Model) -> bool:
    return not any(model.mentions(method, "deepstack_outgrown") for method in (RESIZE, SET))


def leaves_tail(model: Model) -> bool:
    return not (model.mentions(SET, "zero_") or model.calls(SET, CLEAR))


def stays_put(model: Model) -> bool:
    return not model.calls("forward", MOVE)


def same_rows(model: Model) -> bool:
    return not model.mentions(GET, "dbo_current_ubatch_id")


def refuses_padding(model: Model) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(model.methods[GET]))


@dataclass(frozen=True)
class Defect:
    name: str
    title: str
    released: SpecifierSet
    """The releases that have it, as far as they are known."""
    present: Callable[[Path], bool]
    """Whether the code in a folder of models has it."""


def any_of(rule: Callable[[Model], bool]) -> Callable[[Path], bool]:
    return lambda models: any(rule(Model(models, *cls)) for cls in CLASSES.items())


def no_architecture(models: Path) -> bool:
    moe = "qwen3_vl_moe.py", "Qwen3VLMoeForConditionalGeneration"
    found = [(file, name) for file, name in (next(iter(CLASSES.items())), moe)]
    for file, name in found:
        cls = definition(models / file, name)
        init = next((n for n in cls.body if getattr(n, "name", "") == "__init__"), None)
        if init is None:
            raise Unreadable(f"{models / file}: {name} has no __init__")
        if "architectures" not in names(init):
            return True
    return False


def lengths_on_cpu(models: Path) -> bool:
    """`cu_seqlens` are computed from `grid_thw`, which is kept on the CPU, and stay there."""
    cls = definition(models / "qwen3_omni_moe_thinker.py", "Qwen3Omni_VisionTransformer")
    moved = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "cu_seqlens"
        and "self.device" in ast.unparse(node.value)
        for node in ast.walk(cls)
    )
    kept = any(
        isinstance(node, ast.keyword)
        and node.arg == "image_grid_thw"
        and "keep_on_cpu" in names(node.value)
        for node in ast.walk(parse(models / "qwen2_5_omni_thinker.py"))
    )
    return kept and not moved


def defect(
    name: str, title: str, released: str, present: Callable[[Path], bool]
) -> tuple[str, Defect]:
    return name, Defect(name, title, SpecifierSet(released, prereleases=True), present)


DEFECTS = dict(
    [
        defect(
            "D1", "compiled: images lose their DeepStack features", "<0.23", any_of(specialises)
        ),
        defect(
            "D2", "features outlive their step, into other requests", ">=0.23", any_of(outlives)
        ),
        defect("D3", "no start without vision tower", ">=0.23,<0.28", any_of(takes_meta)),
        defect(
            "D4", "a step longer than the buffers loses its own", ">=0.23", any_of(growing_drops)
        ),
        defect("D5", "CUDA graphs read buffers that were outgrown", ">0", any_of(growing_strands)),
        defect("D6", "a shorter payload leaves a longer one's tail", ">0", any_of(leaves_tail)),
        defect("D7", "buffers keep their first device and dtype", ">0", any_of(stays_put)),
        defect("D8", "Qwen3-Omni, images: no start on a Hopper", ">=0.22,<0.24", lengths_on_cpu),
        defect("D9", "dual-batch overlap: both halves read alike", ">0", any_of(same_rows)),
        defect("D10", "a padded step ends the engine", "<0.20.2", any_of(refuses_padding)),
        defect("D11", "Qwen3-VL: no start with pipeline parallelism", "<0.30", no_architecture),
    ]
)
