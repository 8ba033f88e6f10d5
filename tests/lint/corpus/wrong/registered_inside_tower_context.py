"""The buffer is registered beside the tower, in the context that marks it.

Wrong: with a limit of 0 the context is the meta device, and forward reads the buffer.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BelfryForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = SiglipVisionModel(
                config.vision_config, prefix=maybe_prefix(prefix, "vision_tower")
            )
            self.register_buffer(
                "chimes", torch.zeros(rows, config.text_config.hidden_size), persistent=False
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
            )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.chimes.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, chime = torch.cat(multimodal_embeddings).chunk(2, -1)
            embeds[is_multimodal] = main
            self.chimes[: len(embeds)][is_multimodal] = chime  # expect: DS006
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            chimes=self.chimes[: positions.size(-1)],
        )
