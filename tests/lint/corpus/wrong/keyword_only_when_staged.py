"""Position deltas are added to the decoder's keyword arguments only if the step has staged some.

Wrong: without the keyword the decoder takes its default, None, and is compiled so.
"""

import torch
from torch import nn

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import maybe_prefix


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0, "shift": 0}
)
class ShiftedLlama(LlamaModel):
    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, shift=None
    ):
        if shift is not None:
            positions = positions + shift
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


class DeltaVLForCausalLM(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        limit = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("shift", torch.zeros(limit, dtype=torch.long), persistent=False)
        self.shifted_rows = 0
        self.model = ShiftedLlama(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.shift.zero_()
        self.shifted_rows = 0
        embeds = self.model.embed_input_ids(input_ids)
        if is_multimodal is not None and multimodal_embeddings:
            n = input_ids.numel()
            self.shift[:n] = is_multimodal.cumsum(0)  # expect: DS001
            self.shifted_rows = n
            embeds[is_multimodal] = torch.cat(multimodal_embeddings)
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        extra = {}
        if self.shifted_rows:
            extra["shift"] = self.shift[: positions.size(-1)]
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, **extra)
