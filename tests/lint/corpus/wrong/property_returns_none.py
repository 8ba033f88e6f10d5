"""A property gives the staged rows, and None while the count of staged rows is 0.

Wrong: the decoder gets what the property gives, so None at steps that stage nothing.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class KelpForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        size = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("_fronds", torch.zeros(rows, size), persistent=False)
        self._count = 0
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @property
    def fronds(self):
        if self._count == 0:
            return None
        return self._fronds[: self._count]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self._fronds.zero_()
        self._count = 0
        text = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            self._count = input_ids.shape[0]
            self._fronds[: self._count][is_multimodal] = torch.cat(  # expect: DS001
                multimodal_embeddings
            )
        return text

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, residual_prompt=self.fronds
        )
