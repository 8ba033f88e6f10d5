"""Which of the classes that have the defects a model is served by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..cli import UserError
from ..lint.classes import Files
from ..merged import module_of, table

REGISTRY = "vllm/model_executor/models/registry.py"
BACKEND = "Transformers backend"


def kind_of(name: str, root: Path) -> str | None:
    """One of the table's models; None for a model that has no levels, or another class.

    `name` is an architecture, a folder, or a name on the hub. `root` has the vLLM that serves it.

    Raises:
        UserError: there is no configuration, or it names no architecture.
    """
    config = configuration(name)
    architecture = (config.get("architectures") or [name])[0]
    kind = served_by(architecture, root)
    if kind is None and levels(config):
        kind = BACKEND
    key = table().levels.get(kind or "")
    return kind if not config or not key or levels(config) else None


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
        if not config["architectures"]:
            raise KeyError("architectures")
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a model's configuration: {error!r}") from None


def levels(config: dict[str, Any]) -> bool:
    """Whether any part of a configuration has DeepStack levels."""
    return any(
        value if key == "deepstack_visual_indexes" else isinstance(value, dict) and levels(value)
        for key, value in config.items()
    )


def served_by(architecture: str, root: Path) -> str | None:
    """By vLLM's registry, and by what its class inherits."""
    file = root / REGISTRY
    entry = re.search(
        rf'"{re.escape(architecture)}":\s*\(\s*"([\w.]+)",\s*"(\w+)"', file.read_text()
    )
    if not entry:
        return None
    module, name = entry.groups()
    path = f"{module.replace('.', '/')}.py" if "." in module else f"{file.parent / module}.py"
    found = Files([], root).find((root / path).resolve(), name)
    kinds = {of: kind for kind, of in table().kinds.items()}
    for cls in found.lineage if found else ():
        own = module_of(cls.module.file.relative_to(root.resolve()).as_posix())
        if kind := kinds.get((own, cls.name)):
            return kind
    return None
