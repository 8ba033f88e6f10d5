"""What a step stages is a NamedTuple that is made anew at every step, with all rows.

Wrong: a captured graph reads the tensors of an old tuple, and none of them is registered.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class Packet(NamedTuple):
    feats: torch.Tensor
    deltas: torch.Tensor


class PostalForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.packet = Packet(
            torch.zeros(self.rows, width), torch.zeros(self.rows, dtype=torch.long)
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        feats = torch.zeros_like(embeds)
        deltas = torch.zeros_like(input_ids)
        if multimodal_embeddings:
            feats[is_multimodal] = torch.cat(multimodal_embeddings)
            deltas = is_multimodal.long().cumsum(0)
        extra = self.rows - len(embeds)
        self.packet = Packet(  # expect: DS003, DS004
            F.pad(feats, (0, 0, 0, extra)), F.pad(deltas, (0, extra))
        )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        feats, deltas = self.packet
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            feats=feats[:n],
            deltas=deltas[:n],
        )
