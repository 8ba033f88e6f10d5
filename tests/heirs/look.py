"""What models and processors do that inherit something from the overlay, in one vLLM.

`write` runs in a process of its own. It imports vLLM's whole registry, or the heirs that are named.
A model is made by its own `__init__`, of a default configuration, with a stand-in for each part.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch

HIDDEN, LEVELS = 4, 3
TEXT, IMAGE, VIDEO, AUDIO, PROMPT_EMBEDS = 3, 11, 12, 13, 15
INDEXES = "deepstack_visual_indexes"

Step = tuple[list[int], dict[str, list[int]] | None]
"""Its tokens, and its media: how many embeddings each has, by modality. None: without a mask."""
WORDS: Step = ([TEXT] * 3, {})
PICTURE: Step = ([TEXT, IMAGE, IMAGE, IMAGE, TEXT], {"image": [3]})
BESIDE: Step = ([PROMPT_EMBEDS, TEXT, IMAGE], {"prompt_embeds": [1], "image": [1]})
AUDIBLE: Step = ([VIDEO, AUDIO, VIDEO, AUDIO], {"video": [2], "audio": [2]})
ALL_THREE: Step = ([IMAGE, *AUDIBLE[0]], {"image": [1], "video": [2], "audio": [2]})
REPLAYED = "image, then text, replayed"
STEPS: dict[str, list[Step]] = {
    "text": [WORDS, ([TEXT], None)],
    "image": [WORDS, PICTURE, WORDS],
    "two images": [([IMAGE, IMAGE, TEXT, TEXT, IMAGE], {"image": [2, 1]}), WORDS],
    "images that get shorter": [PICTURE, ([IMAGE, TEXT], {"image": [1]}), PICTURE],
    "image and video": [([IMAGE, TEXT, VIDEO, VIDEO], {"image": [1], "video": [2]}), WORDS],
    "image without levels": [([TEXT, IMAGE, IMAGE], {"narrow image": [2]}), WORDS],
    "prompt_embeds": [([PROMPT_EMBEDS, TEXT], {"prompt_embeds": [1]}), WORDS],
    "prompt_embeds and image": [BESIDE, WORDS],
    "audio": [([AUDIO, TEXT], {"audio": [1]}), WORDS],
    "audio and image": [([AUDIO, TEXT, IMAGE], {"audio": [1], "image": [1]}), WORDS],
    "audio in video": [AUDIBLE, WORDS],
    "image and audio in video": [ALL_THREE, WORDS],
    REPLAYED: [PICTURE, WORDS],
}
# Of an encoder: how many levels (None: those that its configuration has by default), whether it is
# loaded, and whether the engine takes embeddings.
KINDS: dict[str, tuple[int | None, bool, bool]] = {
    "levels": (LEVELS, True, False),
    "no levels": (0, True, False),
    "own levels": (None, True, False),
    "embeddings alone": (LEVELS, False, True),
    "embeddings alone, no levels": (0, False, True),
    "text alone": (LEVELS, False, False),
}


def definitions(file: Path) -> dict[str, ast.stmt]:
    body = ast.parse(file.read_bytes()).body if file.exists() else []
    return {getattr(node, "name", ast.unparse(node)): node for node in body}


def changed(released: Path, patched: Path) -> tuple[set[str], set[str]]:
    """The classes that a patched tree has and the release has not, or not so; and the functions
    that it replaces."""
    classes, functions = set(), set()
    for file in (patched / "vllm").rglob("*.py"):
        path = file.relative_to(patched)
        if (released / path).exists() and file.samefile(released / path):
            continue
        before = definitions(released / path)
        for name, node in definitions(file).items():
            old = before.get(name)
            full = f"{'.'.join(path.with_suffix('').parts)}.{name}"
            if old is not None and ast.dump(old) == ast.dump(node):
                continue
            if isinstance(node, ast.ClassDef):
                classes.add(full)
            elif old is not None:
                functions.add(full)
    return classes, functions


@lru_cache
def classes_of(tree: Path) -> dict[str, list[Path]]:
    """Where models' sources have a class of a name."""
    found: dict[str, list[Path]] = {}
    for folder in (tree / "vllm/model_executor/models", tree / "vllm/models"):
        for file in folder.rglob("*.py"):
            for name in re.findall(r"^class (\w+)", file.read_text(), re.M):
                found.setdefault(name, []).append(file)
    return found


def lineage(tree: Path, name: str) -> set[str]:
    """What a class that cannot be imported inherits or is decorated with, by names alone; nothing
    where its source is not found."""
    found, todo = set(), [name]
    while todo:
        for file in classes_of(tree).get(one := todo.pop(), ()):
            found.add(one)
            node = definitions(file)[one]
            assert isinstance(node, ast.ClassDef)
            inside = [n for p in (*node.bases, *node.decorator_list) for n in ast.walk(p)]
            todo += {n.id for n in inside if isinstance(n, ast.Name)} - found - {*todo}
    return found


class NoClassError(Exception):
    """A processing-info takes the configuration as it is, or no class is known for a model."""


class Context:
    """Has a default of the configuration class that it is first asked for."""

    def __init__(self):
        self.config = None

    def get_hf_config(self, cls: Any = None) -> Any:
        if self.config is None:
            if cls is None:
                raise NoClassError
            self.config = (cls[0] if isinstance(cls, tuple) else cls)()
        return self.config


def info_of(arch: str, cls: Any) -> Any:
    """A model's processing-info. Its configuration: of the class that it asks for, else of the
    model's name, else of the class that a processing-info asks for which it inherits."""
    info = cls._processor_factory.info
    made, name = info.__new__(info), re.sub("(For.*|Model)?$", "Config", arch, count=1)
    made.ctx = Context()
    for one in (info, sys.modules[cls.__module__], import_module("transformers"), *info.__mro__):
        try:
            if isinstance(one, types.ModuleType):
                made.ctx.config = getattr(one, name)()
            else:
                one.get_hf_config(made)
            return made
        except (NoClassError, AttributeError):
            continue
    raise NoClassError(arch)


SIZES = dict.fromkeys(("hidden_size", "out_hidden_size", "output_dim"), HIDDEN)
SIZES |= {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
# Of checkpoints: Transformers' classes have them not, or otherwise.
EXTRA: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "pixel_hidden_size", "spatial_conv_size", "temporal_conv_size"), HIDDEN
)
EXTRA |= {"im_patch_id": IMAGE, "joint_head_config": {}, "spatial_target_layers": []}
EXTRA |= {"downsample_rate": "1/2", "use_image_newline_parameter": True, "use_spatial_sampling": 0}


def vision_of(config: Any) -> Any:
    return getattr(getattr(config, "thinker_config", config), "vision_config", None)


def shrink(config: Any, levels: int | None) -> None:
    """A configuration, and those inside it, to these sizes."""
    for name in SIZES.keys() & set(dir(config)):
        setattr(config, name, SIZES[name])
    if levels is not None:
        if hasattr(config, "out_hidden_size"):  # an encoder of Qwen's kind
            setattr(config, INDEXES, [*range(levels)])
        if hasattr(config, "deepstack_layer_map"):
            config.deepstack_layer_map = [[-1, level] for level in range(levels)]
        if hasattr(config, "deepstack_encoder_layer_indexes"):
            config.deepstack_encoder_layer_indexes = [*range(levels)]
    for name in ("thinker", "text", "vision", "audio", "language"):
        inside = getattr(config, f"{name}_config", None)
        if hasattr(inside, "to_dict"):
            shrink(inside, levels)


def configurations(arch: str, cls: Any) -> Iterator[tuple[str, Any]]:
    """By kind of encoder. One that has levels by default is not tried with its own."""
    for kind, (levels, _, _) in KINDS.items():
        info = info_of(arch, cls)
        if levels is not None or not hasattr(vision_of(info.ctx.config), INDEXES):
            shrink(info.ctx.config, levels)
            for name, value in EXTRA.items():
                setattr(info.ctx.config, name, value)
            yield kind, info


class Part(torch.nn.Module):
    """Stands for a part of a model: an encoder, a pooler, a decoder that keeps what it is given."""

    levels: list[int] | None = None
    got: dict[str, Any] = {}
    packed_modules_mapping: dict[str, Any] = {}
    start_layer, end_layer, layers = 0, LEVELS, ()
    config = SimpleNamespace(embedding_multiplier=1.0)

    def __init__(self, *args, **kwargs):
        super().__init__()
        table = torch.arange(16.0 * HIDDEN).view(16, HIDDEN) / 7
        self.embed_input_ids = torch.nn.Embedding.from_pretrained(table)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", INDEXES):
            return self if name == "model" else Part.levels
        try:
            return super().__getattr__(name)
        except AttributeError:
            return MagicMock()

    def forward(self, input_ids=None, positions=None, *args, inputs_embeds=None, **kwargs):
        given = getattr(kwargs.get("deepstack_input_embeds"), "tensors", {})
        if any(level.is_meta for level in given.values()):
            raise ValueError("a decoder's input is on the meta device")
        Part.got = {name: digest(value) for name, value in kwargs.items()}
        return inputs_embeds


@contextmanager
def without_parts(cls: Any) -> Iterator[None]:
    """What a model's `__init__`s call in their modules makes a stand-in."""
    with ExitStack() as stack:
        for one in cls.__mro__:
            if not one.__module__.startswith("vllm."):
                continue
            if "set_moe_parameters" in vars(one):  # asks the decoder's layers
                stack.enter_context(patch.object(one, "set_moe_parameters"))
            init = vars(one).get("__init__")
            codes = [init.__code__] if isinstance(init, types.FunctionType) else []
            for code in codes:
                codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
            names = {name for code in codes for name in code.co_names}
            for name in names - {"get_pp_group", "StageMissingLayer"}:
                part = init.__globals__.get(name)
                module = isinstance(part, type) and issubclass(part, torch.nn.Module)
                if isinstance(part, types.FunctionType) or (module and part not in cls.__mro__):
                    stack.enter_context(patch.dict(init.__globals__, {name: Part}))
        yield


def make(cls: Any, config: Any, tower: bool, embeds: bool) -> Any:
    media = import_module("vllm.config.multimodal").MultiModalConfig(
        enable_mm_embeds=embeds,
        limit_per_prompt=dict.fromkeys(("image", "video", "audio"), int(tower)),
    )
    engine = MagicMock(lora_config=None, use_v2_model_runner=False)
    engine.scheduler_config.max_num_batched_tokens = 16
    engine.parallel_config.tensor_parallel_size = 1
    engine.model_config.hf_config, engine.model_config.head_dtype = config, torch.float32
    engine.model_config.multimodal_config = media
    engine.model_config.get_multimodal_config.return_value = media
    Part.levels = getattr(vision_of(config), INDEXES, None)
    torch.manual_seed(0)
    with without_parts(cls):
        return cls(vllm_config=engine)


def digest(value: Any) -> Any:
    """As JSON. What is zero at the end of a level is left out: a decoder adds levels (D1)."""
    if isinstance(value, torch.Tensor):
        return [round(number, 4) for number in value.float().flatten().tolist()]
    if hasattr(value, "tensors"):
        ends = {
            k: int(v.flatten().nonzero().max()) + 1 for k, v in value.tensors.items() if v.any()
        }
        return {k: digest(value.tensors[k].flatten()[:end]) for k, end in ends.items()} or None
    return value


def step(model: Any, one: Step, levels: int, forward: bool) -> dict[str, Any]:
    """As a model runner has it. A replayed graph does not run `forward`'s Python."""
    tokens, media = one
    ids, embeddings = torch.tensor(tokens), []
    for modality, rows in ((name, rows) for name, all in (media or {}).items() for rows in all):
        width = HIDDEN * (1 + levels * (modality in ("image", "video")))
        made = torch.arange(1.0, 1 + rows * width).view(rows, -1) + 100 * len(embeddings)
        made.modality = modality
        embeddings.append(made)
    more = {} if media is None else {"is_multimodal": ids != TEXT}
    inputs = model.embed_input_ids(ids, None if media is None else embeddings, **more)
    found = {"inputs": digest(inputs)}
    if forward:
        padded, Part.got = torch.nn.functional.pad(inputs, (0, 0, 0, 2)), {}
        positions = torch.zeros(len(padded))
        raw = getattr(model, "requires_raw_input_tokens", False)
        ids = torch.nn.functional.pad(ids, (0, 2)) if raw else None
        output = model.forward(input_ids=ids, positions=positions, inputs_embeds=padded)
        found |= {"decoder": Part.got, "output": digest(output)}
    return found


def attempt(do: Callable[..., Any], *arguments: Any) -> Any:
    """What comes of it, or the error."""
    try:
        return do(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_model(arch: str, cls: Any) -> Iterator[tuple[str, Any]]:
    """What each step gives, by kind of encoder and name of the steps. An error ends them."""
    for kind, info in configurations(arch, cls):
        config, (levels, tower, embeds) = info.ctx.config, KINDS[kind]
        sounds = hasattr(getattr(config, "thinker_config", None), "audio_token_id")
        for name, steps in STEPS.items():
            if ("audio" in name and not sounds) or (kind == "text alone" and name != "text"):
                continue
            with torch.inference_mode():
                model = attempt(make, cls, config, tower, embeds)
                done = [model] if isinstance(model, str) else []
                for at, one in enumerate(steps):
                    if not done or not isinstance(done[-1], str):
                        forward = name != REPLAYED or at > 0
                        done.append(attempt(step, model, one, levels or 0, forward))
            yield f"model, {kind}: {name}", done


def requests(width: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a Hugging Face processor gives for two media."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])
    sizes = [int(grid.prod()) for grid in grids]
    yield "text", {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = {f"{kind}_grid_thw": grids, "second_per_grid_ts": torch.ones(2)}
        yield kind, grid | {pixels: torch.ones(sum(sizes), 6)}
        for size in {width, HIDDEN}:
            name, kept = f"{kind}_embeds", "wide" if size == width else "narrow"
            embeds = [torch.ones(patches // 4, size) for patches in sizes]
            yield f"{name}, {kept}", grid | {name: torch.cat(embeds)}
            yield f"{name}, {kept}, a list", grid | {name: embeds}
    audio = {"audio_feature_lengths": torch.tensor([3, 5])}
    audio["feature_attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    yield "audio", audio | {"input_audio_features": torch.ones(2, 8)}


def fields(processor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """How a request is split into items."""
    batch = import_module("transformers").BatchFeature(inputs)
    config = processor._get_mm_fields_config(batch, {})
    items = import_module("vllm.multimodal.inputs").MultiModalKwargsItems
    split = attempt(items.from_hf_inputs, batch, config)
    if not isinstance(split, str):
        split = {
            modality: [{key: [*part.data.shape] for key, part in item.items()} for item in parts]
            for modality, parts in split.items()
        }
    return {"fields": {k: f"{v.modality} {v.field}" for k, v in config.items()}, "items": split}


def try_processor(arch: str, cls: Any) -> Iterator[tuple[str, Any]]:
    made = cls._processor_factory.processor
    for kind, info in configurations(arch, cls):
        processor = made.__new__(made)
        processor.info = info
        levels = getattr(vision_of(info.ctx.config), INDEXES, None) or ()
        for name, inputs in requests((1 + len(levels)) * HIDDEN) if KINDS[kind][1] else ():
            yield f"processor, {kind}: {name}", attempt(fields, processor, inputs)


def inherited(cls: Any, of: set[str]) -> list[str]:
    names = [f"{one.__module__}.{one.__qualname__}" for one in getattr(cls, "__mro__", ())]
    return [name for name in names if name in of]


def look(tree: Path, of: set[str], wanted: list[str] | None) -> dict[str, Any]:
    """Heirs and what they do; those that cannot be imported, and why; what has no heir."""
    models = import_module("vllm.model_executor.models.registry").ModelRegistry.models
    short = {name.rpartition(".")[2] for name in of}
    heirs, untried, unused = {}, {}, set(of)
    for arch in wanted or sorted(models):
        cls = attempt(models[arch].load_model_cls)
        if isinstance(cls, str):
            found = lineage(tree, models[arch].class_name)
            if not found or found & short:
                untried[arch] = cls
            continue
        if "models.transformers" in cls.__module__:
            continue  # made of Transformers' model, whichever it is: on engines (D16)
        factories = getattr(cls, "_processor_factory", None)
        roles = {role: getattr(factories, role, None) for role in ("processor", "info")}
        roles |= {"model": cls, "dummy_inputs": getattr(factories, "dummy_inputs", None)}
        inherits = {role: names for role, one in roles.items() if (names := inherited(one, of))}
        unused -= {name for names in inherits.values() for name in names}
        if inherits:
            trials = dict(try_model(arch, cls)) if "model" in inherits else {}
            trials |= dict(try_processor(arch, cls)) if "processor" in inherits else {}
            heirs[arch] = {"inherits": inherits, "trials": trials}
    return {"heirs": heirs, "untried": untried, "unused": sorted(unused)}


def write(tree: Path, of: set[str], wanted: list[str] | None, log: Path, answer: Path) -> None:
    """In a process of its own."""
    gc.disable()
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path.insert(0, str(tree))
    os.environ |= {"PYTHONPATH": str(tree), "VLLM_TARGET_DEVICE": "cpu"}
    os.environ["VLLM_CACHE_ROOT"] = str(log.parent / "cache")
    # Older releases import `llava`, and that what Transformers 5.10 has renamed; nothing uses it.
    pixtral = import_module("transformers.models.pixtral.modeling_pixtral")
    for renamed in ("PixtralRotaryEmbedding", "position_ids_in_meshgrid"):
        pixtral.__dict__.setdefault(renamed, torch.nn.Module)
    groups = import_module("vllm.distributed.parallel_state")
    vars(groups)["_PP"] = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1)
    context = import_module("vllm.forward_context")
    vars(context)["_forward_context"] = SimpleNamespace(attn_metadata={})
    answer.write_text(json.dumps(look(tree, of, wanted)))
