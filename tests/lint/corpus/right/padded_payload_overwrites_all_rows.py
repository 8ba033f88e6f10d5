"""There is no clearing: a payload padded to all rows is copied over the buffer on every path.

Right: every row is overwritten at every step, with zeros where nothing is staged.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class FullCoatForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("coat", torch.zeros(self.rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        payload = torch.zeros_like(embeds)
        if multimodal_embeddings:
            payload[is_multimodal] = torch.cat(multimodal_embeddings)
        self.coat.copy_(F.pad(payload, (0, 0, 0, self.rows - payload.size(0))))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            coat=self.coat[: positions.size(-1)],
        )
