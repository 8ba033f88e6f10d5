# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5-VL's experts: a graph has those of text and those of vision (D17)."""

import torch

from vllm.forward_context import get_forward_context


def runs_both(visual_token_mask) -> bool:
    """A graph is captured without media, and replayed with them. Both model runners choose
    it before they embed. So does the profiling run, which measures memory."""
    device = torch.get_device_module(visual_token_mask.device)
    capturing = getattr(device, "is_current_stream_capturing", None)
    profiling = get_forward_context().attn_metadata is None
    return profiling or (capturing is not None and capturing())


class Ernie4_5_VLMoeMoE:
    def forward(self, hidden_states, visual_token_mask, **kwargs):
        if visual_token_mask is not None and runs_both(visual_token_mask):
            # Text, as zeros, all goes to the same few experts of vision: fewer are read.
            states = hidden_states.view(-1, self.hidden_size)
            vision = states * visual_token_mask
            logits, _ = self.vision_experts_gate(vision.float())
            vision = self.vision_experts(hidden_states=vision, router_logits=logits)
            text = self.forward(hidden_states, None).view_as(vision)
            return torch.where(visual_token_mask, vision, text).view_as(hidden_states)
        ...
