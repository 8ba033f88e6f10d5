"""embed_input_ids does all of its work in a context manager that zeroes the buffer on entering.

Right: the clearing comes before the staging and before every return.
"""

from contextlib import contextmanager

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class SlateForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("slate", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @contextmanager
    def _clean_slate(self):
        self.slate.zero_()
        yield self.slate

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        with self._clean_slate() as slate:
            embeds = self.language_model.embed_input_ids(input_ids)
            if not multimodal_embeddings:
                return embeds
            slate[: len(embeds)][is_multimodal] = torch.cat(multimodal_embeddings)
            return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            slate=self.slate[: positions.size(-1)],
        )
