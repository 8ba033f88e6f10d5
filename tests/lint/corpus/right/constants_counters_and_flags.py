"""embed_input_ids counts steps and caches a tensor of token ids; forward hands on constants alone.

Right: the counter and the cache are not handed to the decoder, and what is handed on is not
per-step.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class AbacusForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.special_ids = [config.image_token_id, config.video_token_id]
        self.scale = config.embedding_multiplier
        self.use_rope = bool(config.use_rope)
        table = torch.linspace(0.0, 1.0, config.text_config.hidden_size)
        self.register_buffer("bias_table", table, persistent=False)
        self.steps = 0
        self._ids = None
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.steps += 1
        if self._ids is None:
            self._ids = torch.tensor(self.special_ids, device=input_ids.device)
        embeds = self.language_model.embed_input_ids(input_ids)
        embeds[torch.isin(input_ids, self._ids)] += self.bias_table
        if multimodal_embeddings:
            embeds[is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            scale=self.scale,
            use_rope=self.use_rope,
            bias_table=self.bias_table,
        )
