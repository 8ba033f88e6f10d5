"""A mixin in this file has the buffer and a wipe() that embed_input_ids calls only if there are
media.

Wrong: a text-only step does not wipe.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class OverlayMixin:
    def make_overlay(self, rows, width):
        self.register_buffer("overlay", torch.zeros(rows, width), persistent=False)

    def wipe(self):
        self.overlay.zero_()

    def lay(self, is_multimodal, feats):
        self.overlay[: is_multimodal.numel()][is_multimodal] = feats  # expect: DS002

    def peek(self, n):
        return self.overlay[:n]


class OverlayVLForConditionalGeneration(OverlayMixin, nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        nn.Module.__init__(self)
        self.make_overlay(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        has_media = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        if has_media:
            self.wipe()
            self.lay(is_multimodal, torch.cat(multimodal_embeddings))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        overlay = self.peek(positions.size(-1))
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, overlay=overlay
        )
