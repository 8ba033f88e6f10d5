"""Weights of a model that has no checkpoint: `--load-format dummy`."""

from __future__ import annotations

import zlib
from typing import Any

import torch


@torch.inference_mode()
def draw_weights(model: Any) -> None:
    """The same ones in every engine, and stage of one; wide enough that sounds move the logits."""
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if weight.dim() > 1:
            weight.copy_(0.08 * torch.randn(weight.shape, generator=generator))
        else:
            weight.fill_(float(name.endswith("weight")))  # norms; and biases
