"""A helper module registers its rows, and its stage() replaces them by the payload.

Wrong: the model only calls methods, but the storage is exchanged within the helper.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class Shelf(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.register_buffer("books", torch.zeros(rows, width), persistent=False)

    def clear(self):
        self.books.zero_()

    def stage(self, payload):
        books = torch.zeros_like(self.books)
        books[: payload.size(0)] = payload
        self.books = books  # expect: DS003

    def first(self, n):
        return self.books[:n]


class LibrarianForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.shelf = Shelf(rows, vllm_config.model_config.get_hidden_size())
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.shelf.clear()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            payload = torch.zeros_like(embeds)
            payload[is_multimodal] = torch.cat(multimodal_embeddings)
            self.shelf.stage(payload)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        books = self.shelf.first(positions.size(-1))
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, books=books
        )
