"""__init__ first sets the name to None, and then a method that it always calls puts an nn.Buffer
there.

Right: after __init__ it is never None, and later writes are in place.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class GuestroomForConditionalGeneration(nn.Module, SupportsMultiModal):
    guest: torch.Tensor | None

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.register_buffer("guest", None, persistent=False)
        self._furnish(vllm_config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
            )

    def _furnish(self, vllm_config):
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.guest = nn.Buffer(torch.zeros(rows, width), persistent=False)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.guest.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.guest[: len(embeds)][is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            guest=self.guest[: positions.size(-1)],
        )
