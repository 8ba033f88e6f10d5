"""Indexing with a mask makes a copy, and `zero_` clears that copy.

Wrong: `self.bloom[mask].zero_()` does not touch the buffer.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BloomVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("bloom", torch.zeros(rows, width), persistent=False)
        self.register_buffer("in_bloom", torch.zeros(rows, dtype=torch.bool), persistent=False)
        self.llm = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "llm")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.bloom[self.in_bloom].zero_()
        self.in_bloom.zero_()
        embeds = self.llm.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.in_bloom[: len(input_ids)].copy_(is_multimodal)
            self.bloom[self.in_bloom] = torch.cat(multimodal_embeddings)  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        bloom = self.bloom.narrow(0, 0, positions.size(-1))
        return self.llm.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, bloom=bloom
        )
