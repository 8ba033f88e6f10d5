"""Weights of a model that has no checkpoint: `--load-format dummy`."""

from __future__ import annotations

from typing import Any

import torch


@torch.inference_mode()
def draw_weights(model: Any) -> None:
    """The same ones in every engine; wide enough that sounds move the logits."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.copy_(0.08 * torch.randn(weight.shape, generator=generator))
        else:
            weight.fill_(float(name.endswith("weight")))  # norms; and biases
