"""The name is registered with None, and each step sets it to a tensor or to None.

Wrong: registering a name gives no tensor, so the decoder is compiled with None.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class VacantForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.register_buffer("tenant", None, persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _let_out(self, embeds, feats, mask):
        rows = torch.zeros_like(embeds)
        rows[mask] = feats
        return rows

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        self.tenant = (  # expect: DS001
            self._let_out(embeds, torch.cat(multimodal_embeddings), is_multimodal)
            if multimodal_embeddings
            else None
        )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, tenant=self.tenant
        )
