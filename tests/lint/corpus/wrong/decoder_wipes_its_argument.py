"""The decoder zeroes the tensor that it was handed before it adds it to the hidden states.

Wrong: the wiping is in the compiled part itself, through another name.
"""

import torch
from torch import nn

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import maybe_prefix


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0, "boost": 0}
)
class BoostedLlama(LlamaModel):
    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, boost=None
    ):
        boost.zero_()
        hidden = inputs_embeds + boost
        return super().forward(input_ids, positions, intermediate_tensors, hidden)


class BoosterVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        hidden = vllm_config.model_config.get_hidden_size()
        self.register_buffer("boost_rows", torch.zeros(rows, hidden), persistent=False)
        self.model = BoostedLlama(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.boost_rows.zero_()
        embeds = self.model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            rows = self.boost_rows[: len(embeds)]
            rows[is_multimodal] = torch.cat(multimodal_embeddings)  # expect: DS007
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        boost = self.boost_rows[: positions.size(-1)]
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, boost)
