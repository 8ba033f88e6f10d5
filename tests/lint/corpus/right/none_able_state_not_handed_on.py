"""embed_input_ids notes the last media's sizes, or None; forward reads them for a log line alone.

Right: forward hands none of it to a submodule.
"""

import torch
from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

logger = init_logger(__name__)


class DiaryForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.last_sizes: list[int] | None = None
        self.last_rows: torch.Tensor | None = None
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.last_sizes = [e.shape[0] for e in multimodal_embeddings]
            self.last_rows = is_multimodal.nonzero()
            embeds[is_multimodal] = torch.cat(multimodal_embeddings)
        else:
            self.last_sizes = self.last_rows = None
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        if self.last_rows is not None:
            logger.debug("media of %s tokens", self.last_sizes)
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
