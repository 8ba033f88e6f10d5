"""The staging is in a try; the clearing is in its except.

Wrong: a step that goes well clears nothing, and a text-only step does not even get there.
"""

import torch
from torch import nn

from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

logger = init_logger(__name__)


class CautiousForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        size = vllm_config.model_config.get_hidden_size()
        self.register_buffer("whiskers", torch.zeros(rows, size), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            try:
                feats = torch.cat(multimodal_embeddings).to(embeds.dtype)
                self.whiskers[: len(embeds)][is_multimodal] = feats  # expect: DS002
            except RuntimeError:
                logger.warning("Dropping features of the wrong shape.")
                self.whiskers.zero_()
            finally:
                logger.debug("embedded %d tokens", len(embeds))
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            whiskers=self.whiskers[: positions.size(-1)],
        )
