"""A plain list holds the levels, and each of them is a view of one registered buffer.

Right: the storage is in named_buffers, and clearing the whole clears the views.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class PaneForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        text = vllm_config.model_config.hf_config.text_config
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("window", torch.zeros(3, rows, text.hidden_size), persistent=False)
        self.panes = [self.window[i] for i in range(3)]
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.window.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, *parts = torch.cat(multimodal_embeddings).chunk(4, dim=-1)
            embeds[is_multimodal] = main
            for pane, part in zip(self.panes, parts):
                pane[: len(embeds)][is_multimodal] = part
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
            panes=[p[:n] for p in self.panes],
        )
