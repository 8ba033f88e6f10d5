"""The buffer is made within the tower's context, with an explicit device.

Right: an explicit device= is not the meta device, whatever the context says.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.platforms import current_platform


class SteepleForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        shape = (
            vllm_config.scheduler_config.max_num_batched_tokens,
            config.text_config.hidden_size,
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.tower = SiglipVisionModel(
                config.vision_config, prefix=maybe_prefix(prefix, "tower")
            )
            peal = torch.zeros(shape, device=current_platform.device_type)
            self.register_buffer("peal", peal, persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.peal.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, peal = torch.cat(multimodal_embeddings).chunk(2, -1)
            embeds[is_multimodal] = main
            self.peal[: len(embeds)][is_multimodal] = peal
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            peal=self.peal[: positions.size(-1)],
        )
