"""Which of the classes that have the defects a model is served by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..cli import UserError
from ..lint.classes import Files
from ..merged import module_of, path_of, table

REGISTRY = "vllm/model_executor/models/registry.py"
BACKEND = "Transformers backend"
ENDING = re.compile(r"(For[A-Z]\w+|(Embedding|Reward|Classification|Chat|LMHead)?Model)$")
ENDINGS = ("ForConditionalGeneration", "ForCausalLM")


def kind_of(name: str, root: Path) -> str | None:
    """One of the table's models; None for a model that has no levels, or another class.

    `name` is an architecture, a folder, or a name on the hub. `root` has the vLLM that serves it.

    Raises:
        UserError: there is no configuration, or it names no architecture, or vLLM does not know
            the architecture that is named.
    """
    config = configuration(name)
    architectures = config.get("architectures") or [name]
    found, kind = served_by(architectures, root)
    if not found and not config:
        raise UserError(f"{name}: no folder, and no architecture that this vLLM knows")
    if not found and levels(config):
        return BACKEND
    key = table().levels.get(kind or "")
    # Where a configuration does not say, its class has a default.
    return None if key and levels(config) is False else kind


def configuration(name: str) -> dict[str, Any]:
    """Empty for an architecture."""
    file = Path(name, "config.json")
    if not file.is_file():
        if re.fullmatch(r"\w+", name):
            return {}
        try:
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError
        except ImportError:
            raise UserError(f"{name}: no folder with a config.json") from None
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
        if not isinstance(cached, str):
            raise UserError(
                f"{name}: no folder with a config.json, and none in the hub's cache; name its "
                "architecture: the first of `architectures` there"
            )
        file = Path(cached)
    try:
        config = json.loads(file.read_text())
        names = config["architectures"]
        if not names or not all(isinstance(name, str) for name in names):
            raise KeyError("architectures")
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a model's configuration: {error!r}") from None


def levels(config: dict[str, Any]) -> bool | None:
    """Whether any part of a configuration has DeepStack levels; None where none says."""
    said = [
        bool(value) if key == "deepstack_visual_indexes" else levels(value)
        for key, value in config.items()
        if key == "deepstack_visual_indexes" or isinstance(value, dict)
    ]
    known = [each for each in said if each is not None]
    return any(known) if known else None


def served_by(architectures: list[str], root: Path) -> tuple[bool, str | None]:
    """Whether vLLM's registry has one of them, and the model that its class is, or inherits from.

    As vLLM does, an architecture is also looked up with another ending.

    Raises:
        UserError: there is no registry, or the class is not where it says.
    """
    file = root / REGISTRY
    if not file.is_file():
        raise UserError(f"{file}: missing: --model needs a whole vLLM")
    text = file.read_text()
    names = [
        other
        for name in architectures
        for other in (name, *(ENDING.sub("", name) + ending for ending in ENDINGS))
    ]
    for name in names:
        entry = re.search(rf'"{re.escape(name)}":\s*\(\s*"([\w.]+)",\s*"(\w+)"', text)
        if not entry:
            continue
        module, cls = entry.groups()
        path = (root if "." in module else file.parent) / path_of(module)
        found = Files([], root).find(path.resolve(), cls)
        if not found:
            raise UserError(f"{path}: has no class {cls}, which serves {name}")
        kinds = {of: kind for kind, of in table().kinds.items()}
        for one in found.lineage:
            own = module_of(one.module.file.relative_to(root.resolve()).as_posix())
            if kind := kinds.get((own, one.name)):
                return True, kind
        return True, None
    return False, None
