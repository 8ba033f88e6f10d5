# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL-MoE: starts with pipeline parallelism. The rest it inherits from Qwen3-VL."""


class Qwen3VLMoeForConditionalGeneration:
    # release: <0.30
    def __init__(self, *, vllm_config, prefix=""):
        # Pipeline parallelism looks the decoder's class up by its architecture.
        text_config = vllm_config.model_config.hf_config.text_config
        text_config.architectures = text_config.architectures or ["Qwen3MoeForCausalLM"]
        ...
