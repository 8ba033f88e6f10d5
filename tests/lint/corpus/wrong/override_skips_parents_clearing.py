"""The parent's embed_input_ids clears; the child overrides it and stages without calling it.

Wrong: nothing clears in the child, though the class that has the buffer looks right.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class HarborBase(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        d = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("berths", torch.zeros(rows, d), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.berths.zero_()
        return self.language_model.embed_input_ids(input_ids)

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            berths=self.berths[: positions.size(-1)],
        )


class HarborForVideo(HarborBase):
    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            slots = is_multimodal.nonzero().squeeze(1)
            self.berths[slots] = torch.cat(multimodal_embeddings)  # expect: DS002
        return embeds
