"""The rows up to the previous step's count are cleared, but the count is set to 0 just before.

Wrong: `[:0]` is cleared, which is nothing.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TallyForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        hidden = vllm_config.model_config.get_hidden_size()
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("ledger", torch.zeros(budget, hidden), persistent=False)
        self.tally = 0
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.tally = 0
        self.ledger[: self.tally] = 0
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.tally = input_ids.size(0)
            self.ledger[: self.tally][is_multimodal] = torch.cat(  # expect: DS002
                multimodal_embeddings
            )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            ledger=self.ledger[: positions.size(-1)],
        )
