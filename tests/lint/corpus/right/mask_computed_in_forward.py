"""The mask is computed from input_ids in forward, at each call, and never put on self.

Right: nothing is staged, so nothing can outlive its step; the kernels of a replay compute it anew.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class GlassForConditionalGeneration(nn.Module, SupportsMultiModal):
    requires_raw_input_tokens = True

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.image_token = vllm_config.model_config.hf_config.image_token_id
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _pane_mask(self, input_ids):
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        return mask.masked_fill_(input_ids == self.image_token, True)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self._embed_text_input_ids(
            input_ids, self.language_model.embed_input_ids, is_multimodal=is_multimodal
        )
        if multimodal_embeddings:
            embeds[is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        pane_mask = self._pane_mask(input_ids)
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, visual_token_mask=pane_mask
        )
