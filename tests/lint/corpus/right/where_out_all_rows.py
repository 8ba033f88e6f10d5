"""torch.where with out= writes every row at every step: new values, or zeros.

Right: nothing of the step before is among the operands.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TesseraForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("tesserae", torch.zeros(self.rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        nothing = torch.zeros_like(self.tesserae)
        fresh = torch.zeros_like(self.tesserae)
        chosen = torch.zeros(self.rows, 1, dtype=torch.bool, device=embeds.device)
        if multimodal_embeddings:
            chosen = F.pad(is_multimodal, (0, self.rows - is_multimodal.numel()))[:, None]
            fresh.masked_scatter_(chosen, torch.cat(multimodal_embeddings))
        torch.where(chosen, fresh, nothing, out=self.tesserae)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            tesserae=self.tesserae[: positions.size(-1)],
        )
