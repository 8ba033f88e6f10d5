"""Levels are written in a while loop into rows of the images, and never cleared.

Wrong: rows keep the image of an earlier step, and a text request that sits there gets it.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TerraceVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.depth = len(config.vision_config.terraces)
        self.width = config.text_config.hidden_size
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer(
            "terraces", torch.zeros(self.depth, budget, self.width), persistent=False
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings is None or is_multimodal is None:
            return embeds
        wide = torch.cat(multimodal_embeddings)
        embeds[is_multimodal] = wide[:, : self.width]
        n, level = input_ids.size(0), 0
        while level < self.depth:
            at = (level + 1) * self.width
            self.terraces[level, :n][is_multimodal] = wide[:, at : at + self.width]  # expect: DS002
            level += 1
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            terraces=self.terraces[:, : positions.size(-1)],
        )
