"""The child calls its parent's embed_input_ids first, which calls a method that clears.

Right: two calls away from the staging, the clearing runs on every path.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class QuayBase(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        d = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("moorings", torch.zeros(rows, d), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _cast_off(self):
        self.moorings.fill_(0)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self._cast_off()
        return self.language_model.embed_input_ids(input_ids)

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            moorings=self.moorings[: positions.size(-1)],
        )


class QuayForVideo(QuayBase):
    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = super().embed_input_ids(input_ids)
        if multimodal_embeddings:
            slots = is_multimodal.nonzero().squeeze(1)
            self.moorings[slots] = torch.cat(multimodal_embeddings)
        return embeds
