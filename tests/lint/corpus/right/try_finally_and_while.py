"""The rows are cleared in a while loop and staged in a try whose finally only resets a flag.

Right: the loop clears every level before the first return.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BulkheadForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.dim = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.depth = 2
        self.register_buffer("holds", torch.zeros(self.depth, rows, self.dim), persistent=False)
        self.loading = False
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        level = self.depth
        while level:
            level -= 1
            self.holds[level].zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        try:
            self.loading = True
            if not multimodal_embeddings:
                return embeds
            main, *parts = torch.cat(multimodal_embeddings).split(self.dim, dim=-1)
            embeds[is_multimodal] = main
            for hold, part in zip(self.holds, parts):
                hold[: len(embeds)][is_multimodal] = part
        finally:
            self.loading = False
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        holds = self.holds[:, : positions.size(-1)]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, holds=holds
        )
