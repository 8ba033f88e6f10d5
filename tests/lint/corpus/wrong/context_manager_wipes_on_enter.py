"""forward runs the decoder in a context manager that zeroes all levels on entering; it alone
clears.

Wrong: what was staged is wiped before it is read, and embed_input_ids does not clear.
"""

from contextlib import contextmanager

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TurnstileForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        d = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("gate_a", torch.zeros(rows, d), persistent=False)
        self.register_buffer("gate_b", torch.zeros(rows, d), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    @contextmanager
    def _clean_gates(self):
        torch._foreach_zero_([self.gate_a, self.gate_b])
        yield

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, a, b = torch.cat(multimodal_embeddings).chunk(3, dim=-1)
            embeds[is_multimodal] = main
            for gate, part in ((self.gate_a, a), (self.gate_b, b)):
                gate[: len(embeds)][is_multimodal] = part  # expect: DS002, DS007
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        with self._clean_gates():
            return self.language_model.model(
                input_ids,
                positions,
                intermediate_tensors,
                inputs_embeds,
                gates=(self.gate_a[:n], self.gate_b[:n]),
            )
