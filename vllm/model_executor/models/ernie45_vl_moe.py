# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5-VL's experts: a graph has those of text and those of vision (D17)."""

import torch

from vllm.forward_context import get_forward_context


def runs_both(mask) -> bool:
    """In a graph, which is captured without media, and chosen before they are embedded.
    And in the profiling run, which measures memory."""
    device = torch.get_device_module(mask.device)
    capturing = getattr(device, "is_current_stream_capturing", bool)
    return get_forward_context().attn_metadata is None or capturing()


class Ernie4_5_VLMoeMoE:
    def forward(self, hidden_states, visual_token_mask, **kwargs):
        if visual_token_mask is not None and runs_both(visual_token_mask):
            mask, shape = visual_token_mask, hidden_states.shape
            # Text, as zeros, goes to the same few experts of vision: fewer are read.
            vision = hidden_states.view(-1, self.hidden_size) * mask
            logits, _ = self.vision_experts_gate(vision.float())
            vision = self.vision_experts(hidden_states=vision, router_logits=logits)
            text = self.forward(hidden_states, None).view_as(vision)
            return torch.where(mask, vision, text).view(shape)
        ...
