"""The model of Geo3K-nano before training: Qwen3-VL of four and a half million parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_vl import Qwen3VLProcessor

from benchmarks.geo3k import INSTRUCTION

from .questions import QUESTIONS

VOCABULARY = 512
HIDDEN = 192
PATCH = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
# Attributes under which the processor looks its tokens up.
SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif 'image' in part.type -%}<|vision_start|><|image_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}
"""
RESPONSES = [
    "Triangle: 48+68=116, 180-116=64. Answer: \\boxed{64}",
    "Isosceles: 180-78=102, 102/2=51. Answer: \\boxed{51}",
    "Corresponding: 127. Alternate: 64. Same side: 180-51=129.",
    "Central: 2*70=140. Inscribed: 96/2=48.",
    "Tangent: 90-54=36.",
    "Right triangle: 33^2+56^2=65^2.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every digit is a token."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    prompts = [f"user\n{question} {INSTRUCTION}" for question in QUESTIONS]
    return byte_level_bpe(
        [*prompts, "assistant\n", *RESPONSES], VOCABULARY, SPECIAL, CHAT_TEMPLATE, before=[digits]
    )


def byte_level_bpe(
    texts: list[str],
    size: int,
    special: dict[str, str],
    chat_template: str,
    before: Sequence[pre_tokenizers.PreTokenizer] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts, of `size` tokens at most; `special` by attribute."""
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special.values()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
        chat_template=chat_template,
    )


def decoder_config(tokenizer: PreTrainedTokenizerFast, hidden: int, **sizes: Any) -> dict[str, Any]:
    """Of heads of 32 and with interleaved M-RoPE."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }


def vision_config(out_hidden: int, **sizes: Any) -> dict[str, Any]:
    """Of width 128, for images of up to 16 patches a side without interpolation."""
    return {
        "hidden_size": 128,
        "out_hidden_size": out_hidden,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16**2,
        **sizes,
    }


def make_processor() -> Qwen3VLProcessor:
    half = [0.5] * 3
    limits = {"min_pixels": 4 * 32**2, "max_pixels": 64 * 32**2}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**PATCH, **limits, image_mean=half, image_std=half),
        make_tokenizer(),
        Qwen3VLVideoProcessor(**PATCH),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """With weights drawn from the seed, in float32."""
    token = tokenizer.convert_tokens_to_ids
    text = decoder_config(
        tokenizer, HIDDEN, intermediate_size=352, num_hidden_layers=6, num_attention_heads=6
    )
    vision = vision_config(
        HIDDEN, depth=6, intermediate_size=384, deepstack_visual_indexes=[0, 2, 4]
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token(SPECIAL["image_token"]),
        video_token_id=token(SPECIAL["video_token"]),
        vision_start_token_id=token(SPECIAL["vision_bos_token"]),
        vision_end_token_id=token(SPECIAL["vision_eos_token"]),
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
