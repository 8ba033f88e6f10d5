"""Audio levels are a list that a loop builds, and None at steps without audio.

Wrong: the profiling run hands None to the decoder, and the levels of later steps are ignored.
"""

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class WhaleSongForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.hidden = self.config.text_config.hidden_size
        self.pod_levels: list[torch.Tensor] | None = None
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.pod_levels = None
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        packed = torch.cat(multimodal_embeddings)
        levels = []
        for part in packed.split(self.hidden, dim=-1):
            level = torch.zeros_like(embeds)
            level[is_multimodal] = part
            levels.append(level)
        self.pod_levels = levels  # expect: DS001
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, pod_levels=self.pod_levels
        )
