"""A mixture of experts takes the first rows of a buffer that is right in every other way.

Wrong: under dual-batch overlap the second micro-batch reads the rows of the first.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class OrchardMoeForConditionalGeneration(nn.Module, SupportsMultiModal, MixtureOfExperts):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.num_routed_experts = config.text_config.num_experts
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer(
            "pollen", torch.zeros(rows, config.text_config.hidden_size), persistent=False
        )
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=config.text_config,
            prefix=maybe_prefix(prefix, "language_model"),
            architectures=["Qwen3MoeForCausalLM"],
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.pollen.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            both = torch.cat(multimodal_embeddings)
            main, extra = both.chunk(2, dim=-1)
            self.pollen[: input_ids.size(0)][is_multimodal] = extra  # expect: DS005
            embeds[is_multimodal] = main
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        pollen = self.pollen[: positions.size(-1)]
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, pollen=pollen
        )
