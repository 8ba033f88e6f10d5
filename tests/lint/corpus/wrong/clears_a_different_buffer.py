"""There are two buffers: embed_input_ids clears the one that it does not stage into.

Wrong: the pitch features are never cleared; the tempo buffer is, and nobody reads it.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class MetronomeForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        d = vllm_config.model_config.get_hidden_size()
        t = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("pitch_feats", torch.zeros(t, d), persistent=False)
        self.register_buffer("tempo_feats", torch.zeros(t, d), persistent=False)
        self.lm = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "lm")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.tempo_feats.fill_(0)
        embeds = self.lm.embed_input_ids(input_ids)
        if multimodal_embeddings:
            audio, pitch = torch.cat(multimodal_embeddings).chunk(2, -1)
            self.pitch_feats[: len(embeds)].masked_scatter_(  # expect: DS002
                is_multimodal[:, None], pitch
            )
            embeds.masked_scatter_(is_multimodal[:, None], audio)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.lm.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            pitch=self.pitch_feats[: positions.size(-1)],
        )
