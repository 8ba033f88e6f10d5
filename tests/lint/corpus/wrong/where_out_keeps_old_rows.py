"""torch.where writes all rows with out=, but the rows without a new value take their old one.

Wrong: it overwrites all rows in form only; the values of the step before stay.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class MosaicForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("tiles", torch.zeros(self.rows, self.width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        fresh = torch.zeros_like(self.tiles)
        chosen = torch.zeros(self.rows, 1, dtype=torch.bool, device=embeds.device)
        if multimodal_embeddings:
            chosen = F.pad(is_multimodal, (0, self.rows - is_multimodal.numel()))[:, None]
            fresh.masked_scatter_(chosen, torch.cat(multimodal_embeddings))
        torch.where(chosen, fresh, self.tiles, out=self.tiles)  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            tiles=self.tiles[: positions.size(-1)],
        )
