"""The experts are in the decoder of this file, and rows are read by narrow(0, 0, n); nothing is
cleared.

Wrong: narrow begins at row 0 for each micro-batch, and routing hints outlive their step.
"""

import torch
from torch import nn

from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.interfaces import SupportsMultiModal


class HintedBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = ReplicatedLinear(c.hidden_size, c.num_experts, bias=False)
        self.experts = FusedMoE(
            num_experts=c.num_experts,
            top_k=c.top_k,
            hidden_size=c.hidden_size,
            intermediate_size=c.moe_intermediate_size,
        )

    def forward(self, x, bias):
        logits, _ = self.gate(x)
        return self.experts(hidden_states=x, router_logits=logits + bias)


@support_torch_compile(dynamic_arg_dims={"positions": -1, "inputs_embeds": 0, "route_bias": 0})
class HintedDecoder(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        c = vllm_config.model_config.hf_config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(HintedBlock(c) for _ in range(c.num_hidden_layers))

    def forward(self, positions, inputs_embeds, route_bias):
        x = inputs_embeds
        for layer in self.layers:
            x = x + layer(x, route_bias)
        return x


class HintedVLForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        c = vllm_config.model_config.hf_config
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("route_bias", torch.zeros(rows, c.num_experts), persistent=False)
        self.model = HintedDecoder(vllm_config=vllm_config, prefix=prefix)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        x = self.model.embed_tokens(input_ids)
        if multimodal_embeddings:
            rows = is_multimodal.nonzero().squeeze(-1)
            self.route_bias.index_fill_(0, rows, 1.0)  # expect: DS002, DS005
            x[rows] = torch.cat(multimodal_embeddings)
        return x

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        bias = self.route_bias.narrow(0, 0, positions.size(-1))
        return self.model(positions, inputs_embeds, bias)
