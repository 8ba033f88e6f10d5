"""The clearing is a map() over the levels, and nobody consumes it.

Wrong: a map object does nothing until it is iterated, so no level is zeroed.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class SlothForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("canopy", torch.zeros(rows, width), persistent=False)
        self.register_buffer("floor", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        map(torch.Tensor.zero_, (self.canopy, self.floor))
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, top, bottom = torch.cat(multimodal_embeddings).chunk(3, -1)
            embeds[is_multimodal] = main
            self.canopy[: len(embeds)][is_multimodal] = top  # expect: DS002
            self.floor[: len(embeds)][is_multimodal] = bottom
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
            canopy=self.canopy[:n],
            floor=self.floor[:n],
        )
