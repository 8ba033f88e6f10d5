"""A mask is written by comparing padded ids with out=, without any zeroing and without a branch.

Right: the comparison overwrites all rows at each step, text-only steps included.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class ShutterForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.token = vllm_config.model_config.hf_config.image_token_id
        self.rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("shutter", torch.zeros(self.rows, dtype=torch.bool), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        ids = F.pad(input_ids, (0, self.rows - input_ids.size(0)), value=-1)
        torch.eq(ids, self.token, out=self.shutter)
        if multimodal_embeddings is None or is_multimodal is None:
            return super().embed_input_ids(input_ids)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            visual_token_mask=self.shutter[: positions.size(-1)],
        )
