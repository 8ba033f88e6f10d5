"""Assigning to a property looks like rebinding, but its setter copies into a registered buffer.

Right: the setter writes all rows in place, at every step, on every path.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class FacadeForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("_ornament", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @property
    def ornament(self):
        return self._ornament

    @ornament.setter
    def ornament(self, rows):
        self._ornament.zero_()
        if rows is not None:
            self._ornament[: rows.size(0)].copy_(rows)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.ornament = None
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            rows = torch.zeros_like(embeds)
            rows[is_multimodal] = torch.cat(multimodal_embeddings)
            self.ornament = rows
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            ornament=self.ornament[: positions.size(-1)],
        )
