"""A plain tensor on self is scratch space that embed_input_ids grows, fills and reads, and nobody
else.

Right: forward does not read it, so no graph does.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class WorkbenchForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.width = vllm_config.model_config.get_hidden_size()
        self.bench = torch.zeros(0, self.width)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _room_for(self, like):
        if self.bench.size(0) < like.size(0):
            self.bench = torch.empty_like(like)
        return self.bench[: like.size(0)]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        room = self._room_for(embeds)
        torch.mul(embeds, 0.5, out=room)
        room[is_multimodal] += torch.cat(multimodal_embeddings)
        return room.clone()

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
