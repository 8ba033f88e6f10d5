"""Levels are registered by name, read with getattr, zeroed and copied by torch._foreach_ functions.

Right: the functions work in place on all levels, and zeroing comes first.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class LadderForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        hf = vllm_config.model_config.hf_config
        shape = (vllm_config.scheduler_config.max_num_batched_tokens, hf.text_config.hidden_size)
        self.num_rungs = hf.num_rungs
        for i in range(self.num_rungs):
            self.register_buffer(f"rung_{i}", torch.zeros(shape), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @property
    def rungs(self):
        return [getattr(self, f"rung_{i}") for i in range(self.num_rungs)]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        torch._foreach_zero_(self.rungs)
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        main, *rest = torch.cat(multimodal_embeddings).chunk(self.num_rungs + 1, dim=-1)
        embeds[is_multimodal] = main
        payload = [embeds.new_zeros(embeds.shape) for _ in rest]
        for rows, part in zip(payload, rest):
            rows[is_multimodal] = part
        torch._foreach_copy_([r[: len(embeds)] for r in self.rungs], payload)
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
            rungs=[r[:n] for r in self.rungs],
        )
