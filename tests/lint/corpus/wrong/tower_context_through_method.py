"""A method makes the buffers, and __init__ calls it within the tower's context.

Wrong: the method does not look like it, but its tensors are on the meta device, too.
"""

import torch
from torch import nn

from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BeaconForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self._build_vision(vllm_config, prefix)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
            )

    def _build_vision(self, vllm_config, prefix):
        self.visual = CLIPVisionModel(
            self.config.vision_config, prefix=maybe_prefix(prefix, "visual")
        )
        self._build_beams(vllm_config.scheduler_config.max_num_batched_tokens)

    def _build_beams(self, rows):
        width = self.config.text_config.hidden_size
        self.register_buffer("beams", torch.zeros(2, rows, width), persistent=False)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.beams.fill_(0)
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, near, far = torch.cat(multimodal_embeddings).chunk(3, -1)
            embeds[is_multimodal] = main
            for beam, part in zip(self.beams, (near, far)):
                beam[: len(embeds)][is_multimodal] = part  # expect: DS006
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            beams=self.beams[:, : positions.size(-1)],
        )
