# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: the buffers' methods come from the mixin, not the model."""

from .deepstack import DeepStackMixin


class Qwen3VLForConditionalGeneration(DeepStackMixin): ...
