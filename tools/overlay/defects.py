"""Which of the defects a tree's code has, read from the code: nothing is imported or run.

A rule judges what the code does, not what it calls things: where state is staged, cleared, bound
again, read. So it holds for vLLM as released, for the fork, and for a fix of somebody else's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from packaging.specifiers import SpecifierSet

from ..lint.classes import own_attribute

MODELS = "vllm/model_executor/models"
RUNNER = "vllm/v1/worker/gpu_model_runner.py"
GET, SET = "_get_deepstack_input_embeds", "_set_deepstack_input_embeds"
EMBED, FORWARD, INIT = "embed_input_ids", "forward", "__init__"


class Unreadable(Exception):
    """The code is not laid out as in any release that the rules were made for."""


@dataclass(frozen=True)
class Kind:
    """A class of vLLM's that stages DeepStack features, or something like them."""

    file: str
    name: str
    storage: str = "deepstack_input_embeds"
    """The attribute that what is staged waits in."""
    methods: tuple[str, ...] = (INIT, EMBED, FORWARD, GET, SET)
    """Those that the rules ask for."""


KINDS = {
    "Qwen3-VL": Kind(f"{MODELS}/qwen3_vl.py", "Qwen3VLForConditionalGeneration"),
    "Qwen3-VL-MoE": Kind(f"{MODELS}/qwen3_vl_moe.py", "Qwen3VLMoeForConditionalGeneration"),
    "Qwen3-Omni": Kind(
        f"{MODELS}/qwen3_omni_moe_thinker.py", "Qwen3OmniMoeThinkerForConditionalGeneration"
    ),
    "Cohere Compass": Kind(f"{MODELS}/cohere_compass.py", "CohereCompassForConditionalGeneration"),
    "Granite 4 Vision": Kind(
        f"{MODELS}/granite4_vision.py",
        "Granite4VisionForConditionalGeneration",
        "_ds_buffers",
        (INIT, EMBED, FORWARD),
    ),
    "MOSS-Audio": Kind(f"{MODELS}/moss_audio.py", "MossAudioModel", methods=(INIT, EMBED, FORWARD)),
    "Ernie 4.5-VL": Kind(
        f"{MODELS}/ernie45_vl.py",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "visual_token_mask",
        (INIT, EMBED, FORWARD),
    ),
}
EVERYWHERE = "Qwen3-VL"  # which every vLLM has: without it, this is none that can be read
INTERNS1_PRO = Kind(f"{MODELS}/interns1_pro.py", "InternS1ProForConditionalGeneration")


@dataclass
class Code:
    """The files of a vLLM by their paths, `vllm/…/qwen3_vl.py`."""

    root: Path
    served: Mapping[str, bytes] = field(default_factory=dict)
    """Those that the plugin serves in place of, or beside, the tree's own."""
    parsed: dict[str, ast.Module] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        return path in self.served or (self.root / path).is_file()

    def parse(self, path: str) -> ast.Module:
        if path not in self.parsed:
            try:
                data = self.served.get(path)
                self.parsed[path] = ast.parse(data or (self.root / path).read_text())
            except FileNotFoundError:
                raise Unreadable(f"{self.root / path}: missing") from None
            except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
                raise Unreadable(f"{self.root / path}: {error}") from None
        return self.parsed[path]

    def definition(self, path: str, name: str) -> ast.ClassDef:
        for node in self.parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise Unreadable(f"{self.root / path}: has no class {name}")

    def lineage(self, path: str, name: str) -> list[ast.ClassDef]:
        """A class and its bases in the tree, nearest first. What is not in the tree has no part."""
        body = self.parse(path).body
        found = [self.definition(path, name)]
        for base in found[0].bases:
            if not isinstance(base, ast.Name):
                continue
            if any(isinstance(node, ast.ClassDef) and node.name == base.id for node in body):
                found += self.lineage(path, base.id)
            elif (source := self.imported_from(path, base.id)) and self.has(source[0]):
                found += self.lineage(*source)
        return found

    def imported_from(self, path: str, name: str) -> tuple[str, str] | None:
        """The file and the name there of what a module imports under a name."""
        for node in self.parse(path).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    folder = PurePosixPath(path).parents[node.level - 1] if node.level else ""
                    file = PurePosixPath(folder, *(node.module or "").split("."))
                    return f"{file}.py", alias.name
        return None


@dataclass
class Model:
    """A class with what it inherits from others in the tree."""

    code: Code
    kind: Kind
    methods: dict[str, ast.FunctionDef] = field(default_factory=dict)
    setters: dict[str, ast.FunctionDef] = field(default_factory=dict)
    """The setters of properties. Setting such an attribute is a call."""
    bound: set[str] = field(default_factory=set)
    """All names that the classes' bodies bind."""

    def __post_init__(self) -> None:
        for cls in self.code.lineage(self.kind.file, self.kind.name):
            for node in cls.body:
                if isinstance(node, ast.Assign):
                    self.bound.update(name for target in node.targets for name in names(target))
                if not isinstance(node, ast.FunctionDef):
                    continue
                self.bound.add(node.name)
                setter = any(
                    isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list
                )
                (self.setters if setter else self.methods).setdefault(node.name, node)
        for method in self.kind.methods:
            if method not in self.methods:
                raise self.unreadable(f"{self.kind.name} has no {method}")

    def unreadable(self, problem: str) -> Unreadable:
        return Unreadable(f"{self.code.root / self.kind.file}: {problem}")

    @cached_property
    def storage(self) -> set[str]:
        """The attribute that what is staged waits in; of a property, what it returns as well."""
        getter = self.methods.get(self.kind.storage)
        nodes = ast.walk(getter) if getter else ()
        returned = [n.value for n in nodes if isinstance(n, ast.Return) and n.value]
        return {self.kind.storage, *filter(None, map(own_attribute, returned))}

    def walk(self, *nodes: ast.AST) -> Iterator[ast.AST]:
        """All that runs there, in methods that are called as well."""
        left, seen = list(nodes), set()
        while left:
            for node in ast.walk(left.pop()):
                yield node
                name = own_attribute(node)
                if name in self.methods and name not in seen:
                    seen.add(name)
                    left.append(self.methods[name])

    def reached(self, *methods: str) -> Iterator[ast.AST]:
        return self.walk(*(self.methods[name] for name in methods if name in self.methods))

    def mentions(self, word: str) -> bool:
        nodes = [*self.methods.values(), *self.setters.values()]
        return any(word in names(node) for node in nodes)

    @cached_property
    def cleared_state(self) -> dict[str, object]:
        """Plain attributes that some step sets to `None` or to 0, and what to."""
        return {
            name: value.value
            for name, value in self.assigned(EMBED, FORWARD, GET)
            if isinstance(value, ast.Constant) and not value.value and name not in self.setters
        }

    def assigned(self, *methods: str) -> Iterator[tuple[str, ast.expr]]:
        for node in self.reached(*methods):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if name := own_attribute(target):
                        yield name, node.value

    def on_state(self, test: ast.AST) -> bool:
        return not self.cleared_state.keys().isdisjoint(names(test))

    def rebinding(self, *methods: str) -> list[str]:
        """Methods that bind what is staged to other memory, of those that these reach."""
        found = []
        for name in {*methods, *filter(None, map(own_attribute, self.reached(*methods)))}:
            node = self.methods.get(name)
            if node and any(
                own_attribute(target) in self.storage and not isinstance(part.value, ast.Constant)
                for part in ast.walk(node)
                if isinstance(part, ast.Assign)
                for target in part.targets
            ):
                found.append(name)
        return found


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


def has(nodes: Iterator[ast.AST], *kinds: type[ast.AST]) -> bool:
    return any(isinstance(node, kinds) for node in nodes)


def clears(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "zero_"
    )


def gives_none(node: ast.If) -> bool:
    return any(
        isinstance(part, ast.Return)
        and (part.value is None or (isinstance(part.value, ast.Constant) and not part.value.value))
        for part in node.body
    )


def specialises(model: Model) -> bool:
    """D1: what the decoder gets is `None` at some steps: those with nothing staged."""
    if GET in model.methods:
        return any(
            isinstance(node, ast.If) and model.on_state(node.test) and gives_none(node)
            for node in ast.walk(model.methods[GET])
        )
    none = {name for name, value in model.cleared_state.items() if value is None}
    return any(
        own_attribute(node) in none and isinstance(getattr(node, "ctx", None), ast.Load)
        for node in ast.walk(model.methods[FORWARD])
    )


def clears_when_embedding(model: Model) -> bool:
    """Before the first way out: at steps without an image as well."""
    for statement in model.methods[EMBED].body:
        if has(ast.walk(statement), ast.Return):
            return False
        if any(clears(node) for node in model.walk(statement)):
            return True
    return False


def clearing_is_captured(model: Model) -> bool:
    """`forward` clears at every step, or a graph would not have it."""
    return always(model, model.methods[FORWARD].body)


def always(model: Model, statements: list[ast.stmt], seen: frozenset[str] = frozenset()) -> bool:
    """Whether statements clear, whatever is staged. `seen`: methods that led here."""
    for statement in statements:
        if isinstance(statement, ast.If):
            if model.on_state(statement.test):
                if has(ast.walk(statement), ast.Return):
                    return False
                continue
            if always(model, statement.body, seen):
                return True
        elif isinstance(statement, (ast.For, ast.With)):
            if always(model, statement.body, seen):
                return True
        else:
            for node in ast.walk(statement):
                name = own_attribute(node) or ""
                called = model.methods.get(name) if name not in seen else None
                if clears(node) or (called and always(model, called.body, seen | {name})):
                    return True
    return False


def outlives(model: Model) -> bool:
    return not (specialises(model) or clears_when_embedding(model) or clearing_is_captured(model))


def mask_outlives(model: Model) -> bool:
    """D2 of what is staged as an attribute: unless each step begins by taking it back."""
    for statement in model.methods[EMBED].body:
        if isinstance(statement, ast.Assign) and model.kind.storage in names(statement.targets[0]):
            return False
        if has(ast.walk(statement), ast.If, ast.Return):
            return True
    return True


def takes_meta(model: Model) -> bool:
    made = any(
        isinstance(node, ast.With)
        and "_mark_tower_model" in names(node.items[0])
        and any(
            own_attribute(target) == model.kind.storage
            for part in ast.walk(node)
            if isinstance(part, ast.Assign)
            for target in part.targets
        )
        for node in ast.walk(model.methods[INIT])
    )
    return made and not specialises(model) and not model.mentions("is_meta")


def growing_drops(model: Model) -> bool:
    keeping = {"pad", "copy_", "cat"}
    return any(keeping.isdisjoint(names(model.methods[name])) for name in model.rebinding(GET))


def growing_strands(model: Model) -> bool:
    return bool(model.rebinding(EMBED, GET, SET))


def leaves_tail(model: Model) -> bool:
    return not (clears_when_embedding(model) or any(clears(node) for node in model.reached(SET)))


def unregistered(model: Model) -> bool:
    """Not in `named_buffers()`, which a class may also define itself."""
    setter = model.setters.get(model.kind.storage)
    if "named_buffers" in model.bound or (setter and "register_buffer" in names(setter)):
        return False
    return not any(
        {"register_buffer", model.kind.storage} <= {*names(statement)}
        for statement in ast.walk(model.methods[INIT])
        if isinstance(statement, ast.stmt)
        and not isinstance(statement, (ast.FunctionDef, ast.If, ast.With))
    )


def same_rows(model: Model) -> bool:
    """Reading begins at row 0, whichever micro-batch it is for."""
    return any(
        isinstance(node, ast.Slice) and node.lower is None and node.upper is not None
        for node in ast.walk(model.methods[GET])
    )


def refuses_padding(model: Model) -> bool:
    return has(ast.walk(model.methods[GET]), ast.Raise)


def no_architecture(model: Model) -> bool:
    return "architectures" not in names(model.methods[INIT])


def lengths_on_cpu(model: Model) -> bool:
    """`cu_seqlens` are computed from `grid_thw`, which is kept on the CPU, and stay there."""
    cls = model.code.definition(model.kind.file, "Qwen3Omni_VisionTransformer")
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
        for node in ast.walk(model.code.parse(f"{MODELS}/qwen2_5_omni_thinker.py"))
    )
    return kept and not moved


def refuses_prompts(model: Model) -> bool:
    """Positions are counted, and a prompt for which the count is wrong is an exception."""
    method = model.methods.get("get_mrope_input_positions")
    if method is None:
        raise model.unreadable("no get_mrope_input_positions")
    return has(ast.walk(method), ast.Raise)


def unchecked_stage(model: Model) -> bool:
    compared = [
        node
        for node in ast.walk(model.methods[INIT])
        if isinstance(node, (ast.Assert, ast.If)) and has(ast.walk(node), ast.Raise, ast.Assert)
    ]
    words = {*names(model.methods[INIT])}
    return not (compared and words & {"start_layer", "end_layer"})


def splits_all(model: Model) -> bool:
    """All embeddings are joined and split alike: such as have no levels are an exception."""
    method = model.methods.get("_compute_deepstack_embeds")
    if method is None:
        raise model.unreadable("no _compute_deepstack_embeds")
    joined = any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.cat"
        and ast.unparse(node.args[0]) == "multimodal_embeddings"
        for node in ast.walk(method)
    )
    return joined and any(
        isinstance(node, ast.Constant) and node.value == "prompt_embeds"
        for node in ast.walk(model.code.parse(RUNNER))
    )


def told_apart_by_length(model: Model) -> bool:
    """Where a video's and an audio's tokens alternate, whose embeddings are whose."""
    return "image_token_id" not in names(model.methods[EMBED])


def ignores_embeddings(model: Model) -> bool:
    return not model.mentions("enable_mm_embeds")


@dataclass(frozen=True)
class Rule:
    present: Callable[[Model], bool]
    released: dict[str, SpecifierSet]
    """By model, the releases that have the defect, as far as they are known."""


@dataclass(frozen=True)
class Defect:
    title: str
    rules: tuple[Rule, ...]
    latent: bool = False
    """No engine reaches it as it is."""

    @property
    def models(self) -> dict[str, tuple[Callable[[Model], bool], SpecifierSet]]:
        return {
            name: (rule.present, specifier)
            for rule in self.rules
            for name, specifier in rule.released.items()
        }


def rule(present: Callable[[Model], bool], **released: str) -> Rule:
    """Which releases have it, by groups of models."""
    groups = {
        "vl": ("Qwen3-VL", "Qwen3-VL-MoE"),
        "moe": ("Qwen3-VL-MoE",),
        "omni": ("Qwen3-Omni",),
        "compass": ("Cohere Compass",),
        "granite": ("Granite 4 Vision",),
        "moss": ("MOSS-Audio",),
        "ernie": ("Ernie 4.5-VL",),
    }
    return Rule(
        present,
        {
            name: SpecifierSet(specifier, prereleases=True)
            for group, specifier in released.items()
            for name in groups[group]
        },
    )


ALWAYS = ">0"
SHARED = {"vl": ALWAYS, "omni": ALWAYS, "compass": ALWAYS}
DEFECTS = {
    "D1": Defect(
        "compiled: images lose their DeepStack features",
        (rule(specialises, vl="<0.23", omni="<0.23", moss=ALWAYS),),
    ),
    "D2": Defect(
        "features outlive their step, into other requests",
        (
            rule(outlives, vl=">=0.23", omni=">=0.23", compass=ALWAYS, granite=ALWAYS),
            rule(mask_outlives, ernie=ALWAYS),
        ),
    ),
    "D3": Defect(
        "no start without vision tower",
        (rule(takes_meta, vl=">=0.23,<0.28", omni=">=0.23,<0.28", compass=ALWAYS),),
    ),
    "D4": Defect(
        "a step longer than the buffers loses its own",
        (rule(growing_drops, vl=">=0.23", omni=">=0.23", compass=ALWAYS),),
        latent=True,
    ),
    "D5": Defect(
        "CUDA graphs read buffers that were outgrown",
        (rule(growing_strands, **SHARED, granite=ALWAYS),),
        latent=True,
    ),
    "D6": Defect(
        "a shorter payload leaves a longer one's tail",
        (rule(leaves_tail, **SHARED, granite=ALWAYS),),
        latent=True,
    ),
    "D7": Defect(
        "buffers do not outlive sleep(level=2)",
        (rule(unregistered, **SHARED, granite=ALWAYS),),
    ),
    "D8": Defect("images: no start on a Hopper", (rule(lengths_on_cpu, omni=">=0.22,<0.24"),)),
    "D9": Defect(
        "dual-batch overlap: both halves read alike",
        # The others are dense, and overlap is for expert parallelism.
        (rule(same_rows, moe=ALWAYS, omni=ALWAYS),),
    ),
    "D10": Defect(
        "a padded step ends the engine", (rule(refuses_padding, vl="<0.20.2", omni="<0.20.2"),)
    ),
    "D11": Defect("no start with pipeline parallelism", (rule(no_architecture, vl="<0.30"),)),
    "D12": Defect(
        "a prompt that ends in a medium ends the engine", (rule(refuses_prompts, omni=ALWAYS),)
    ),
    "D13": Defect(
        "levels are lost where the first stage is short", (rule(unchecked_stage, omni=ALWAYS),)
    ),
    "D14": Defect(
        "prompt_embeds beside images end the engine",
        (rule(splits_all, vl=">=0.21", compass=ALWAYS),),
    ),
    "D15": Defect(
        "embeddings instead of images lose their levels", (rule(ignores_embeddings, **SHARED),)
    ),
    "D21": Defect(
        "audio in video beside an image ends the engine",
        (rule(told_apart_by_length, omni="<0.26"),),
    ),
}


def drops_levels(code: Code) -> bool:
    """InternS1-Pro inherits Qwen3-VL's class, and makes no buffers for the levels it computes."""
    if not code.has(INTERNS1_PRO.file):
        return False
    model = Model(code, INTERNS1_PRO)
    return model.kind.storage not in {name for name, _ in model.assigned(INIT)}
