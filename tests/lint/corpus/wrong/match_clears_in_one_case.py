"""A match over what the step has: one case clears, another stages, and the last does nothing.

Wrong: a step with None leaves what was staged, and a step with media stages beside it.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class CaseyForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.hidden_size = vllm_config.model_config.get_hidden_size()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("hint_rows", torch.zeros(rows, self.hidden_size), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        match multimodal_embeddings:
            case []:
                self.hint_rows.zero_()
            case [first, *others]:
                flat = torch.cat([first, *others])
                self.hint_rows[: embeds.size(0)][is_multimodal] = flat  # expect: DS002
            case _:
                pass
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            hints=self.hint_rows[: positions.size(-1)],
        )
