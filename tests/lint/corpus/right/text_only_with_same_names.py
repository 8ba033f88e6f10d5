"""A text model has properties and methods with the names that staging models use.

Right: there is no multimodal input, and what forward hands on is made in __init__ and never
written.
"""

import torch
from torch import nn

from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import maybe_prefix


class ScribeForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        size = vllm_config.model_config.get_hidden_size()
        self.register_buffer("_offset", torch.ones(1, size), persistent=False)
        self.num_levels = 0
        self.model = LlamaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    @property
    def deepstack_input_embeds(self):
        return self._offset

    @property
    def visual_token_mask(self):
        return None

    def _clear_deepstack_input_embeds(self, num_tokens):
        del num_tokens

    def embed_input_ids(self, input_ids):
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return self.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            deepstack_input_embeds=self.deepstack_input_embeds,
        )
