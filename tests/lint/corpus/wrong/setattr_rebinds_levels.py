"""Levels are registered by name, and setattr exchanges them at every step in a loop.

Wrong: a captured graph reads the tensors of the step in which it was captured.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class SteppedVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    N_STEPS = 3

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.cap = vllm_config.scheduler_config.max_num_batched_tokens
        self.dim = vllm_config.model_config.get_hidden_size()
        for k in range(self.N_STEPS):
            self.register_buffer(f"step_{k}", torch.zeros(self.cap, self.dim), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        feats = torch.cat(multimodal_embeddings) if multimodal_embeddings else None
        for k in range(self.N_STEPS):
            level = embeds.new_zeros(self.cap, self.dim)
            if feats is not None:
                level[: len(embeds)][is_multimodal] = feats[:, k * self.dim : (k + 1) * self.dim]
            setattr(self, f"step_{k}", level)  # expect: DS003
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        steps = [getattr(self, f"step_{k}")[:n] for k in range(self.N_STEPS)]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, steps=steps
        )
