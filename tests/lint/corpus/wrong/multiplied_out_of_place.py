"""`self.veil * 0` looks like clearing, but makes a new tensor that is thrown away.

Wrong: the buffer keeps its values.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class VeilForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        size = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("veil", torch.zeros(rows, size), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _reset(self):
        veil = self.veil
        veil = veil * 0
        return veil

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self._reset()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            rows = is_multimodal.nonzero().view(-1)
            self.veil.index_add_(0, rows, torch.cat(multimodal_embeddings))  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            veil=self.veil[: positions.size(-1)],
        )
