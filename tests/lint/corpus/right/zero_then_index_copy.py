"""The buffer is registered, zeroed first, written in place with index_copy_, and handed on at each
step.

Right: it keeps each rule, and its clearing after the read in forward is only an extra.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class PlainForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("extra", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.extra.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        where = is_multimodal.nonzero().squeeze(-1)
        self.extra.index_copy_(0, where, torch.cat(multimodal_embeddings))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        hidden = self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            extra=self.extra[: positions.size(-1)],
        )
        self.extra.zero_()
        return hidden
