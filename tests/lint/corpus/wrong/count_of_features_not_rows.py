"""Features are staged at the rows of their tokens, and as many rows as there were features are
cleared.

Wrong: with text before the image, the staged rows lie behind the cleared ones.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class OffsetVLModel(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        c = vllm_config.model_config.hf_config
        m = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("side_channel", torch.zeros(m, c.hidden_size), persistent=False)
        self._n_feats = 0
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.side_channel[: self._n_feats].zero_()
        self._n_feats = 0
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            feats = torch.cat(multimodal_embeddings)
            self._n_feats = feats.size(0)
            self.side_channel[: input_ids.size(0)][is_multimodal] = feats  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.shape[-1]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, side=self.side_channel[:n]
        )
