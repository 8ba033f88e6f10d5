"""A context manager zeroes the buffer on leaving, and only forward uses it.

Wrong: embed_input_ids itself does not clear, and a replay does not run the context manager.
"""

from contextlib import contextmanager

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BorrowVL(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.dim = vllm_config.model_config.get_hidden_size()
        n = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("loan", torch.zeros(n, self.dim), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @contextmanager
    def _borrowed(self, n):
        try:
            yield self.loan[:n]
        finally:
            self.loan.zero_()

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings and is_multimodal is not None:
            a, b = torch.cat(multimodal_embeddings).split(self.dim, dim=-1)
            embeds[is_multimodal] = a
            self.loan[: len(embeds)][is_multimodal] = b  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        with self._borrowed(positions.size(-1)) as loan:
            return self.language_model.model(
                input_ids, positions, intermediate_tensors, inputs_embeds, loan=loan
            )
