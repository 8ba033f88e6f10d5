"""The buffer is registered and cleared, but a conditional expression hands on None where it is
empty.

Wrong: the decoder is compiled while the flag is False, without the input.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class LanternForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        cfg = vllm_config.model_config.hf_config
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("glow", torch.zeros(rows, cfg.hidden_size), persistent=False)
        self.lit = False
        self.llm = init_vllm_registered_model(
            vllm_config=vllm_config, hf_config=cfg.text_config, prefix=maybe_prefix(prefix, "llm")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.glow.zero_()
        self.lit = bool(multimodal_embeddings)
        out = self.llm.embed_input_ids(input_ids)
        if self.lit:
            where = is_multimodal.nonzero().squeeze(-1)
            self.glow.index_copy_(0, where, torch.cat(multimodal_embeddings))  # expect: DS001
        return out

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        glow = self.glow[:n] if self.lit else None
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds, glow=glow)
