"""forward puts a new tensor of this step's length under the buffer's name, then hands it on.

Wrong: the rebinding drops what was staged, and graphs read storage that is no longer written.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class CuckooForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.width = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("egg", torch.zeros(rows, self.width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.egg.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.egg[: len(embeds)][is_multimodal] = torch.cat(  # expect: DS003, DS007
                multimodal_embeddings
            )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        self.egg = self.egg.new_zeros(self.egg.shape)
        egg = self.egg[: positions.size(-1)]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, egg=egg
        )
