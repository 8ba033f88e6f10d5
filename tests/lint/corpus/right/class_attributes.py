"""Class attributes, one of them None and one a dict, are read by both methods and handed on.

Right: nobody writes them after the class is made.
"""

from typing import ClassVar

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class HeraldForConditionalGeneration(nn.Module, SupportsMultiModal):
    merge_size: ClassVar[int] = 2
    residual_prompt: ClassVar[torch.Tensor | None] = None
    layer_of_level: ClassVar[dict[int, int]] = {0: 2, 1: 5}

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            merged = [e[:: self.merge_size] for e in multimodal_embeddings]
            embeds[is_multimodal] = torch.cat(merged)
        if self.residual_prompt is not None:
            embeds = embeds + self.residual_prompt
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            residual_prompt=self.residual_prompt,
            layer_of_level=self.layer_of_level,
        )
