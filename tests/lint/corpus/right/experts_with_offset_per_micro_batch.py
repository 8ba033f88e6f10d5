"""A mixture of experts keeps where the first micro-batch ended, and the second one reads from
there.

Right: each micro-batch reads its own rows under dual-batch overlap.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled


class GroveMoeForConditionalGeneration(nn.Module, SupportsMultiModal, MixtureOfExperts):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        text = vllm_config.model_config.hf_config.text_config
        self.num_routed_experts = text.num_experts
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("sap", torch.zeros(rows, text.hidden_size), persistent=False)
        self._end = 0
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _rows_of_this_micro_batch(self, n):
        begin = self._end if dbo_enabled() and dbo_current_ubatch_id() > 0 else 0
        self._end = begin + n
        return self.sap[begin : begin + n]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.sap.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.sap[: len(embeds)][is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        sap = self._rows_of_this_micro_batch(positions.size(-1))
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, sap=sap
        )
