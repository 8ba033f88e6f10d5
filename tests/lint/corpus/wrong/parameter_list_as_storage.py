"""The rows are frozen entries of an nn.ParameterList.

Wrong: parameters are registered, but not as buffers, so sleep(level=2) discards them.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class FrostVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        hidden = vllm_config.model_config.get_hidden_size()
        cap = vllm_config.scheduler_config.max_num_batched_tokens
        self.frost = nn.ParameterList(
            nn.Parameter(torch.zeros(cap, hidden), requires_grad=False) for _ in range(2)
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        for layer in self.frost:
            layer.data.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, a, b = torch.cat(multimodal_embeddings).chunk(3, dim=-1)
            embeds[is_multimodal] = main
            for layer, part in zip(self.frost, (a, b)):
                layer.data[: len(embeds)][is_multimodal] = part  # expect: DS004
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
            frost=[p[:n] for p in self.frost],
        )
