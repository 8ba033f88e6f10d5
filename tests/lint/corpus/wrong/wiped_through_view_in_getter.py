"""A getter takes a view of the rows, zeroes the buffer, and returns the view.

Wrong: a view is no copy, so the decoder reads zeros.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class MagpieForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("nest", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _take(self, n):
        taken = self.nest[:n]
        self.nest.zero_()
        return taken

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.nest.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            where = is_multimodal.nonzero().flatten()
            self.nest.index_copy_(0, where, torch.cat(multimodal_embeddings))  # expect: DS007
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        loot = self._take(positions.size(-1))
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, loot=loot
        )
