"""The buffer is cleared and staged under a local name.

Right: an alias is the same tensor, and `buf[:] = 0` and index_add_ work in place.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class AliasVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        dim = vllm_config.model_config.get_hidden_size()
        self.register_buffer(
            "nickname",
            torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, dim),
            persistent=False,
        )
        self.llm = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "llm")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        buf = self.nickname
        rows = buf
        rows[:] = 0
        embeds = self.llm.embed_input_ids(input_ids)
        if multimodal_embeddings:
            slots = is_multimodal.nonzero().view(-1)
            for start in range(0, len(slots), 1024):
                part = slots[start : start + 1024]
                buf.index_add_(0, part, torch.cat(multimodal_embeddings)[start : start + 1024])
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        view = self.nickname
        return self.llm.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            nickname=view[: positions.size(-1)],
        )
