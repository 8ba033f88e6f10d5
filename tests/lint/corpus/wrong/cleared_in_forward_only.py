"""forward zeroes the rows after the decoder has read them, and embed_input_ids relies on that.

Wrong: clearing in forward is Python that a replayed graph does not run as written.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class TidalForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        dim = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("tide", torch.zeros(rows, dim), persistent=False)
        self.wet_rows = 0
        self.backbone = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.backbone.embed_input_ids(input_ids)
        if multimodal_embeddings:
            where = torch.nonzero(is_multimodal).flatten()
            self.tide.index_copy_(0, where, torch.cat(multimodal_embeddings))  # expect: DS002
            self.wet_rows = input_ids.size(0)
        return embeds

    def _ebb(self):
        if self.wet_rows > 0:
            self.tide[: self.wet_rows].zero_()
            self.wet_rows = 0

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        hidden = self.backbone.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            tide=self.tide[: positions.size(-1)],
        )
        self._ebb()
        return hidden
