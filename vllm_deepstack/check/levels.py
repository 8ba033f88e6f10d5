"""Takes DeepStack's levels from a model, in the process that runs it.

A module of its own: vLLM pickles functions by name from one process to the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

GETTER = "_get_deepstack_input_embeds"
STORAGE = "deepstack_input_embeds"
LAYER = "deepstack"  # the Transformers backend's, with the fork: on each layer that adds a level
KEPT = "_check_levels_kept"
UNKNOWN = "_check_levels_unknown"


def without_levels(model: Any) -> int:
    """Has zeros in place of the DeepStack levels that a model gives its decoder; on an eager
    engine, which asks for them at each step. Returns how many modules give any."""
    getters = [m for m in model.modules() if hasattr(m, GETTER) and getattr(m, STORAGE, True)]
    for module in getters:
        module.__dict__[GETTER] = partial(zeros, getattr(module, GETTER))
    layers = [m for m in model.modules() if isinstance(getattr(m, LAYER, None), torch.Tensor)]
    for layer in layers:
        layer.__dict__[KEPT] = getattr(layer, LAYER)
        setattr(layer, LAYER, 0 * layer.__dict__[KEPT])
    return len(getters)


def zeros(getter: Any, *given: Any, **named: Any) -> Any:
    levels = getter(*given, **named)
    if hasattr(levels, "tensors"):
        return type(levels)({name: 0 * level for name, level in levels.tensors.items()})
    if levels is not None:
        getter.__self__.__dict__[UNKNOWN] = True
    return levels


def with_levels(model: Any) -> bool:
    """Undoes it. Returns whether there were zeros wherever there are levels."""
    modules = list(model.modules())
    for module in modules:
        module.__dict__.pop(GETTER, None)
        if KEPT in module.__dict__:
            setattr(module, LAYER, module.__dict__.pop(KEPT))
    return not any(module.__dict__.pop(UNKNOWN, False) for module in modules)
