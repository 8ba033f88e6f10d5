"""Which of the defects a tree's code has, read from the code: nothing is imported or run.

The table of known files (requirements/files.json) is made of what these rules find in all releases,
before and with the fork. A rule judges what the code does, not what it calls things: where state
is staged, cleared, bound again, read. So it holds for vLLM as released, for the fork, and for a fix
of somebody else's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from packaging.specifiers import SpecifierSet

from vllm_deepstack.lint.classes import own_attribute
from vllm_deepstack.package_index import CONFIG, RUNNERS

MODELS = "vllm/model_executor/models"
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
    "Transformers backend": Kind(
        f"{MODELS}/transformers/multimodal.py", "MultiModalMixin", methods=("embed_multimodal",)
    ),
}


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

    def lineage(self, path: str, name: str) -> list[tuple[str, ast.ClassDef]]:
        """A class and its bases in the tree, nearest first, each with its file. What is not in the
        tree has no part."""
        body = self.parse(path).body
        found = [(path, self.definition(path, name))]
        for base in found[0][1].bases:
            if not isinstance(base, ast.Name):
                continue
            if any(isinstance(node, ast.ClassDef) and node.name == base.id for node in body):
                found += self.lineage(path, base.id)
            elif (source := self.imported_from(path, base.id)) and self.has(source[0]):
                found += self.lineage(*source)
        return found

    def borrowed(self, path: str, value: ast.expr) -> list[ast.FunctionDef]:
        """What `Class.name` means in a module that imports the class: a property has two."""
        if not (isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name)):
            return []
        source = self.imported_from(path, value.value.id)
        try:
            lineage = self.lineage(*source) if source and self.has(source[0]) else []
        except Unreadable:  # no class
            return []
        return [
            node
            for _, cls in lineage
            for node in cls.body
            if isinstance(node, ast.FunctionDef) and node.name == value.attr
        ]

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
        for path, cls in self.code.lineage(self.kind.file, self.kind.name):
            for node in cls.body:
                if isinstance(node, ast.Assign):
                    bound = [name for target in node.targets for name in names(target)]
                    for function in self.code.borrowed(path, node.value):
                        self.add(bound[0], function)
                    self.bound.update(bound)
                elif isinstance(node, ast.FunctionDef):
                    self.add(node.name, node)
        for method in self.kind.methods:
            if method not in self.methods:
                raise self.unreadable(f"{self.kind.name} has no {method}")

    def add(self, name: str, node: ast.FunctionDef) -> None:
        self.bound.add(name)
        decorators = [getattr(decorator, "attr", None) for decorator in node.decorator_list]
        (self.setters if "setter" in decorators else self.methods).setdefault(name, node)

    def unreadable(self, problem: str) -> Unreadable:
        return Unreadable(f"{self.code.root / self.kind.file}: {problem}")

    @cached_property
    def storage(self) -> set[str]:
        """The attribute that what is staged waits in; of a property, what it returns as well."""
        getter = self.methods.get(self.kind.storage)
        nodes = ast.walk(getter) if getter else ()
        returned = [n.value for n in nodes if isinstance(n, ast.Return) and n.value]
        return {self.kind.storage, *filter(None, map(own_attribute, returned))}

    @cached_property
    def clearing(self) -> set[ast.AST]:
        """The calls of `zero_` on what is staged, also by another name, and on nothing else."""
        found: set[ast.AST] = set()
        for function in [*self.methods.values(), *self.setters.values()]:
            aliases = set(self.storage)
            while (
                more := {
                    name
                    for target, value in bindings(function)
                    if aliases & {*names(value)}
                    for name in names(target)
                }
                - aliases
                - {"self"}
            ):
                aliases |= more
            for node in ast.walk(function):
                if method_of(node) == "zero_":
                    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    if aliases & {*names(node.func.value)}:
                        found.add(node)
        return found

    def clears(self, node: ast.AST) -> bool:
        return node in self.clearing

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


def method_of(node: ast.AST) -> str | None:
    """That a call calls."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr
    return None


def bindings(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is bound to what, in assignments and loops; not what counts them."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            yield from ((target, node.value) for target in node.targets)
        elif isinstance(node, (ast.For, ast.comprehension)):
            called = getattr(getattr(node.iter, "func", None), "id", None)
            if called == "enumerate" and isinstance(node.target, ast.Tuple):
                yield node.target.elts[-1], node.iter
            elif called != "range":
                yield node.target, node.iter


def gives_none(node: ast.If) -> bool:
    return any(
        isinstance(part, ast.Return)
        and (part.value is None or (isinstance(part.value, ast.Constant) and not part.value.value))
        for part in node.body
    )


def reads(node: ast.AST) -> str | None:
    """The name of `self.name`, unless it is assigned to."""
    return own_attribute(node) if isinstance(getattr(node, "ctx", None), ast.Load) else None


def specialises(model: Model) -> bool:
    """D1: what the decoder gets is `None` at some steps: those with nothing staged."""
    if GET in model.methods:
        return any(
            isinstance(node, ast.If) and model.on_state(node.test) and gives_none(node)
            for node in ast.walk(model.methods[GET])
        )
    none = {name for name, value in model.cleared_state.items() if value is None}
    return any(reads(node) in none for node in ast.walk(model.methods[FORWARD]))


def clears_when_embedding(model: Model) -> bool:
    """Before the first way out: at steps without an image as well."""
    for statement in model.methods[EMBED].body:
        if has(ast.walk(statement), ast.Return):
            return False
        if any(model.clears(node) for node in model.walk(statement)):
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
                if model.clears(node) or (called and always(model, called.body, seen | {name})):
                    return True
    return False


def outlives(model: Model) -> bool:
    return not (specialises(model) or clears_when_embedding(model) or clearing_is_captured(model))


def compares_tokens(node: ast.AST) -> bool:
    """`input_ids` with others, one by one; not whether there are any."""
    compared: list[ast.expr] = []
    if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        compared = [node.left, *node.comparators]
    elif method_of(node) in ("isin", "eq"):
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        compared = [node.func.value, *node.args]
    return any(isinstance(part, ast.Name) and part.id == "input_ids" for part in compared)


def masks_its_own_tokens(model: Model) -> bool:
    """`forward` computes the mask of its own tokens before it reads one, whatever is staged."""
    for statement in model.methods[FORWARD].body:
        if isinstance(statement, ast.If) and model.storage & {*names(statement.test)}:
            return False
        if any(compares_tokens(node) for node in model.walk(statement)):
            return True
        if any(reads(node) in model.storage for node in ast.walk(statement)):
            return False
    return False


def experts_ask_in_python(model: Model) -> bool:
    """Whether any token is visual, before there is a way on which nothing asks: a graph has the
    branch that was taken when it was captured."""
    path, mask = f"{MODELS}/ernie45_vl_moe.py", model.kind.storage
    for node in model.code.definition(path, "Ernie4_5_VLMoeMoE").body:
        if isinstance(node, ast.FunctionDef) and node.name == FORWARD:
            for statement in node.body:
                if isinstance(statement, ast.If) and mask in names(statement.test):
                    asks = {"any", "all"} & {*names(statement)}
                    return bool(asks) or not has(ast.walk(statement), ast.Return)
            return False
    raise model.unreadable(f"{path}: Ernie4_5_VLMoeMoE has no {FORWARD}")


def graphs_have_text_alone(model: Model) -> bool:
    """D17: a replayed graph does not see which tokens are visual."""
    return not masks_its_own_tokens(model) or experts_ask_in_python(model)


def mask_outlives(model: Model) -> bool:
    """D2 of what is staged as an attribute: unless each step begins by taking it back, or by
    computing its own."""
    if masks_its_own_tokens(model):
        return False
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
    return not (
        clears_when_embedding(model) or any(model.clears(node) for node in model.reached(SET))
    )


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
    return joined and has_prompt_embeds(model.code)


def has_prompt_embeds(code: Code) -> bool:
    """`prompt_embeds` come among the media's embeddings, as parts of a prompt."""
    return any(
        isinstance(node, ast.Constant) and node.value == "prompt_embeds"
        for node in ast.walk(code.parse(RUNNERS[0]))
    )


def reads_width(node: ast.AST) -> bool:
    """Of a tensor, `size(1)`, `shape[-1]` and the like."""
    return any(
        re.search(r"\.(size\(-?1\)|shape\[-?1\])$", ast.unparse(part))
        for part in ast.walk(node)
        if isinstance(part, (ast.Call, ast.Subscript))
    )


def splits_alike(model: Model, name: str) -> bool:
    """A method splits embeddings into levels, and nothing before has chosen or filled them up by
    their widths: `prompt_embeds`, which have no levels, are an exception."""
    method = model.methods.get(name)
    if method is None:
        raise model.unreadable(f"no {name}")
    by_width: set[str] = set()
    for statement in in_order(method.body):
        if any(method_of(node) == "split" for node in ast.walk(statement)):
            return has_prompt_embeds(model.code) and by_width.isdisjoint(names(statement))
        for target, value in pairs(statement):
            if isinstance(target, ast.Name) and (reads_width(value) or by_width & {*names(value)}):
                by_width.add(target.id)
    raise model.unreadable(f"{name} splits nothing")


def in_order(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that hold no others, as they stand."""
    for statement in statements:
        if isinstance(statement, (ast.If, ast.For, ast.With)):
            yield from in_order(statement.body)
            yield from in_order(getattr(statement, "orelse", []))
        else:
            yield statement


def splits_images_alike(model: Model) -> bool:
    return splits_alike(model, EMBED)


def splits_sounds_alike(model: Model) -> bool:
    return splits_alike(model, "_split_multimodal_embeddings")


def graphs_and_pruning_take_all(model: Model) -> bool:
    return encodes_embeddings(model) or prunes_all(model)


def prunes_all(model: Model) -> bool:
    """With pruning, positions are beside each embedding, and are taken off. `prompt_embeds` have
    none, and lose columns of their own, unless they are told by their width."""
    name = "recompute_mrope_positions"
    if name not in model.methods:
        raise model.unreadable(f"no {name}")
    told = any(
        isinstance(node, ast.Assign) and reads_width(node.value) for node in model.reached(name)
    )
    return not told and has_prompt_embeds(model.code)


def encodes_embeddings(model: Model) -> bool:
    """Encoder graphs take pixels alone, and are there with `enable_mm_embeds` as well."""
    name = "get_encoder_cudagraph_config"
    if name not in model.methods:
        return False
    return not any("enable_mm_embeds" in names(node) for node in model.reached(name))


def levels_unread(model: Model) -> bool:
    """D16: of what Transformers' encoder gives, its levels are not taken, or are dropped."""
    return not any(
        isinstance(node, ast.FunctionDef) and keeps_levels(node)
        for node in model.reached("embed_multimodal")
    )


def keeps_levels(function: ast.FunctionDef) -> bool:
    """A name that is given them, and is read nowhere, keeps nothing."""
    read = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
            value = node.iter if isinstance(node, ast.For) else node.value
            targets = node.targets if isinstance(node, ast.Assign) else []
            dropped = targets and all(isinstance(t, ast.Name) and t.id not in read for t in targets)
            if value and not dropped and "deepstack_features" in names(value):
                return True
    return False


def stages_miss_levels(model: Model) -> bool:
    """D19: a stage waits for levels that an earlier one keeps; or they are cleared when they have
    not been sent, which is done after `forward`, from the buffers themselves."""
    path, method = model.kind.file, "make_empty_intermediate_tensors"
    for node in model.code.definition(path, "Granite4VisionLLMForCausalLM").body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return "start_layer" not in names(node) or clears_at_once(model)
    raise model.unreadable(f"Granite4VisionLLMForCausalLM has no {method}")


def clears_at_once(model: Model) -> bool:
    """`forward` clears, and not only if there is something that it has itself set to 0 before, or
    that staging ends with setting to 0."""
    zero: set[str] = set()
    for statement in model.methods[EMBED].body:
        for target, value in pairs(statement):
            if name := own_attribute(target):
                nothing = isinstance(value, ast.Constant) and not value.value
                (zero.add if nothing else zero.discard)(name)
    for statement in model.methods[FORWARD].body:
        if isinstance(statement, ast.If) and zero & {*names(statement.test)}:
            continue
        if any(model.clears(node) for node in model.walk(statement)):
            return True
        for target, value in pairs(statement):
            if (name := own_attribute(target)) and isinstance(value, ast.Constant):
                (zero.discard if value.value else zero.add)(name)
    return False


def pairs(statement: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What an assignment gives to what: `a, b = c, d` are two."""
    if not isinstance(statement, ast.Assign):
        return
    for target in statement.targets:
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            yield from zip(target.elts, statement.value.elts)
        else:
            yield target, statement.value


def shares_decoders(model: Model) -> bool:
    """D20: the key of compiled decoders lacks the limits, vLLM's own and what a model adds to it
    when it is made. An engine with limits of 0 has no levels."""
    for node in model.code.definition(CONFIG, "ModelConfig").body:
        if isinstance(node, ast.FunctionDef) and node.name == "compute_hash":
            if "limit_per_prompt" in names(node):
                return False
            break
    else:
        raise model.unreadable(f"{CONFIG}: ModelConfig has no compute_hash")
    called = [model.setters[name] for name, _ in model.assigned(INIT) if name in model.setters]
    return not any(
        {"additional_config", "limit_per_prompt"} <= {*names(node)}
        for node in [model.methods[INIT], *called]
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
    instead: str = ""
    """What to do in releases in which the overlay leaves it."""


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

    @property
    def instead(self) -> str:
        """What to do where the overlay leaves it in some release."""
        return next((rule.instead for rule in self.rules if rule.instead), "")


def rule(present: Callable[[Model], bool], *, instead: str = "", **released: str) -> Rule:
    """Which releases have it, by groups of models."""
    groups = {
        "vl": ("Qwen3-VL", "Qwen3-VL-MoE"),
        "moe": ("Qwen3-VL-MoE",),
        "omni": ("Qwen3-Omni",),
        "compass": ("Cohere Compass",),
        "granite": ("Granite 4 Vision",),
        "moss": ("MOSS-Audio",),
        "ernie": ("Ernie 4.5-VL",),
        "transformers": ("Transformers backend",),
    }
    return Rule(
        present,
        {
            name: SpecifierSet(specifier, prereleases=True)
            for group, specifier in released.items()
            for name in groups[group]
        },
        instead,
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
    "D16": Defect(
        "--model-impl transformers: images lose their DeepStack features",
        (
            rule(
                levels_unread,
                transformers=ALWAYS,
                instead="serve DeepStack models without --model-impl transformers",
            ),
        ),
    ),
    "D17": Defect(
        "CUDA graphs send image tokens to the experts of text",
        (rule(graphs_have_text_alone, ernie=ALWAYS),),
    ),
    "D18": Defect(
        "embeddings that have no levels, or no pixels, end the engine",
        (
            rule(splits_images_alike, granite=">=0.21"),
            rule(splits_sounds_alike, moss=ALWAYS),
            rule(
                graphs_and_pruning_take_all,
                vl=ALWAYS,
                compass=ALWAYS,
                instead="leave cudagraph_mm_encoder off where requests may send embeddings",
            ),
        ),
    ),
    "D19": Defect(
        "pipeline parallelism: levels do not reach later stages",
        (rule(stages_miss_levels, granite=ALWAYS),),
    ),
    "D20": Defect(
        "engines with and without a tower share a compiled decoder",
        (
            rule(
                shares_decoders,
                **dict.fromkeys(("vl", "omni", "compass", "granite", "moss"), "<0.33"),
            ),
        ),
    ),
    "D21": Defect(
        "audio in video beside an image ends the engine",
        (rule(told_apart_by_length, omni="<0.26"),),
    ),
}


def judged(root: Path) -> dict[str, dict[str, str]]:
    """By model that a tree has, and defect: `present`, `latent` or `gone`."""
    code = Code(root)
    found: dict[str, dict[str, str]] = {}
    for name, kind in KINDS.items():
        if code.has(kind.file):
            model = Model(code, kind)
            found[name] = {
                defect: "gone"
                if not of.models[name][0](model)
                else "latent"
                if of.latent
                else "present"
                for defect, of in DEFECTS.items()
                if name in of.models
            }
    return found


def worst(models: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """By defect, of all models."""
    order = ("present", "latent", "gone")
    return {
        name: min((of[name] for of in models.values() if name in of), key=order.index)
        for name in DEFECTS
        if any(name in of for of in models.values())
    }
