"""The levels are a list comprehension on self: cleared and staged right, and not registered.

Wrong: tensors in a list are not in named_buffers.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class RidgelineVL(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        text = vllm_config.model_config.hf_config.text_config
        cap = vllm_config.scheduler_config.max_num_batched_tokens
        self.ridges = [torch.zeros(cap, text.hidden_size) for _ in range(text.num_ridges)]
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        [r.zero_() for r in self.ridges]
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        where = is_multimodal.nonzero().squeeze(-1)
        main, *rest = torch.cat(multimodal_embeddings).chunk(1 + len(self.ridges), dim=-1)
        embeds.index_copy_(0, where, main)
        for i, part in enumerate(rest):
            self.ridges[i].index_copy_(0, where, part)  # expect: DS004
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            ridges=[r[:n] for r in self.ridges],
        )
