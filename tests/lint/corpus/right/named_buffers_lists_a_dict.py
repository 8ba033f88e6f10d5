"""A dict of tensors is not registered, but named_buffers is overridden and yields them.

Right: the rule is about named_buffers, and they are in it.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class CloakroomForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self._coats = {name: torch.zeros(rows, width) for name in ("left", "right")}
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def named_buffers(self, *args, **kwargs):
        yield from super().named_buffers(*args, **kwargs)
        for name, coat in self._coats.items():
            yield f"coats_{name}", coat

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        for coat in self._coats.values():
            coat.zero_()
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            main, left, right = torch.cat(multimodal_embeddings).chunk(3, -1)
            embeds[is_multimodal] = main
            self._coats["left"][: len(embeds)][is_multimodal] = left
            self._coats["right"][: len(embeds)][is_multimodal] = right
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        coats = {name: coat[: positions.size(-1)] for name, coat in self._coats.items()}
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, coats=coats
        )
