# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: the buffers' methods come from the mixin, not the model."""

from .deepstack import DeepStackMixin


class Qwen3OmniMoeThinkerForConditionalGeneration(DeepStackMixin): ...
