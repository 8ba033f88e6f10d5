"""forward copies a constant row over the staged rows before it hands them on.

Wrong: it is no zeroing, but it overwrites what was staged for this step.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class WallpaperForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("pattern", torch.full((1, width), 0.5), persistent=False)
        self.register_buffer("paper", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.paper.copy_(self.pattern.expand_as(self.paper))
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.paper[: len(embeds)][is_multimodal] = torch.cat(  # expect: DS007
                multimodal_embeddings
            )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        paper = self.paper[: positions.size(-1)]
        paper.copy_(self.pattern.expand_as(paper))
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, paper=paper
        )
