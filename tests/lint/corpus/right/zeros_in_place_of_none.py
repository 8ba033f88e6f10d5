"""A conditional expression picks which features to write, never what the decoder gets.

Right: steps without media write zeros to all rows, and the decoder gets the same buffer.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class LevelCrossingForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.cap = vllm_config.scheduler_config.max_num_batched_tokens
        self.width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("barrier", torch.zeros(self.cap, self.width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _features(self, embeddings, is_multimodal):
        full = self.barrier.new_zeros(self.cap, self.width)
        full[: is_multimodal.numel()][is_multimodal] = torch.cat(embeddings)
        return full

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        features = (
            self._features(multimodal_embeddings, is_multimodal) if multimodal_embeddings else None
        )
        if features is None:
            self.barrier.zero_()
        else:
            self.barrier.copy_(features)
        return self.language_model.embed_input_ids(input_ids)

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        barrier = self.barrier[: positions.size(-1)]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, barrier=barrier
        )
