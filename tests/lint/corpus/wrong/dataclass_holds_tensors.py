"""A dataclass on self holds two tensors that are staged and cleared in place.

Wrong: the tensors of a dataclass are not registered.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


@dataclass
class Cargo:
    feats: torch.Tensor
    weight: torch.Tensor


class FreightForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.cargo = Cargo(feats=torch.zeros(rows, width), weight=torch.zeros(rows, 1))
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        cargo = self.cargo
        torch._foreach_zero_([cargo.feats, cargo.weight])
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            n = embeds.size(0)
            cargo.feats[:n][is_multimodal] = torch.cat(multimodal_embeddings)  # expect: DS004
            cargo.weight[:n].copy_(is_multimodal[:, None])
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
            cargo=self.cargo.feats[:n],
            cargo_weight=self.cargo.weight[:n],
        )
