"""A helper module registers the rows and has stage(), clear() and a property that reads.

Right: it is a submodule, so its buffer is registered, and it works in place.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class Drawer(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.register_buffer("content", torch.zeros(rows, width), persistent=False)

    def clear(self) -> None:
        self.content.zero_()

    def stage(self, mask: torch.Tensor, feats: torch.Tensor) -> None:
        self.content[: mask.numel()][mask] = feats

    @property
    def all_rows(self) -> torch.Tensor:
        return self.content


class CabinetForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.drawer = Drawer(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        drawer = self.drawer
        drawer.clear()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            drawer.stage(is_multimodal, torch.cat(multimodal_embeddings))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            drawer=self.drawer.all_rows[: positions.size(-1)],
        )
