"""Two registered buffers are unpacked into names; both are staged, and only one is cleared.

Wrong: the high band outlives its step.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TwoBandAudioModel(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        shape = (
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
        )
        self.register_buffer("low_band", torch.zeros(shape), persistent=False)
        self.register_buffer("high_band", torch.zeros(shape), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        low, high = self.low_band, self.high_band
        low.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        where = is_multimodal.nonzero().squeeze(-1)
        main, lo, hi = torch.cat(multimodal_embeddings).chunk(3, dim=-1)
        embeds.index_copy_(0, where, main)
        low.index_copy_(0, where, lo)
        high.index_copy_(0, where, hi)  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        bands = (self.low_band[:n], self.high_band[:n])
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, bands=bands
        )
