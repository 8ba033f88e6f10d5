"""There is no clearing at the top: each case of a match clears in its own way.

Right: on every path the buffer is cleared before it is staged and before the return.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class ForkForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("tines", torch.zeros(rows, width), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        match multimodal_embeddings:
            case None | [] | ():
                self.tines.zero_()
                return embeds
            case [only]:
                self.tines.fill_(0)
                self.tines[: len(embeds)][is_multimodal] = only
            case _:
                torch.zeros(self.tines.shape, out=self.tines)
                self.tines[: len(embeds)][is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            tines=self.tines[: positions.size(-1)],
        )
