"""A small class with stage() and clear() holds the rows, and it is not a module.

Wrong: all of its use is right, but named_buffers does not look into plain objects.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class Tray:
    def __init__(self, rows: int, width: int):
        self.rows = torch.zeros(rows, width)

    def clear(self) -> None:
        self.rows.zero_()

    def stage(self, mask: torch.Tensor, feats: torch.Tensor) -> None:
        self.rows[: mask.numel()][mask] = feats  # expect: DS004

    def view(self, n: int) -> torch.Tensor:
        return self.rows[:n]


class CanteenForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.tray = Tray(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.model_config.get_hidden_size(),
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.tray.clear()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.tray.stage(is_multimodal, torch.cat(multimodal_embeddings))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            tray=self.tray.view(positions.size(-1)),
        )
