"""A local tensor is made within the tower's context and registered after it.

Wrong: where a tensor is made decides, not where it is registered.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.model_executor.models.whisper import WhisperEncoder


class FoghornForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        size = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        with self._mark_tower_model(vllm_config, "audio"):
            self.audio_tower = WhisperEncoder(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "audio_tower")
            )
            storage = torch.zeros(rows, size)
        self.register_buffer("horn", storage, persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.horn[:] = 0
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            idx = torch.nonzero(is_multimodal)[:, 0]
            self.horn.index_add_(0, idx, torch.cat(multimodal_embeddings))  # expect: DS006
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            horn=self.horn[: positions.size(-1)],
        )
