"""Only the rows up to the previous step's count are set to 0, before the count is set anew.

Right: no row behind that count was ever staged, so all rows are clear.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class ThriftForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("spent", torch.zeros(rows, width), persistent=False)
        self.used = 0
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        n, self.used = self.used, 0
        self.spent[:n] = 0
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.used = input_ids.size(0)
            self.spent[: self.used][is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            spent=self.spent[: positions.size(-1)],
        )
