"""Clearing zeroes row 0 of the mask alone.

Wrong: the other rows keep the mask of the step before.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class SieveForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("sieve", torch.zeros(rows, 1, dtype=torch.bool), persistent=False)
        self.decoder = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "decoder")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.sieve[0].zero_()
        x = self.decoder.embed_input_ids(input_ids)
        if is_multimodal is not None:
            idx = is_multimodal.nonzero()
            self.sieve.scatter_(0, idx, True)  # expect: DS002
            x[is_multimodal] = torch.cat(multimodal_embeddings)
        return x

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        sieve = self.sieve[: positions.size(-1)]
        return self.decoder.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, sieve=sieve
        )
