"""Tiny Qwen3-VL and Qwen3-Omni checkpoints, complete, with weights drawn from a seed.

    python -m tests.tiny_models qwen3_vl OUT_DIR [SEED]

Four decoder layers of hidden size 128, three DeepStack levels, float32. Weights are drawn
wide enough that every branch of the model moves the logits (of a scale of about 3).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_omni_moe import Qwen3OmniMoeProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor

from benchmarks.geo3k_nano import model as nano
from benchmarks.geo3k_nano.model import byte_level_bpe, decoder_config

HIDDEN = 128
LEVELS = 3
# Attributes under which the processors look their tokens up.
SPECIAL = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")} | {
    f"{kind}_{end}_token": f"<|{kind}_{word}|>"
    for kind in ("vision", "audio")
    for end, word in (("bos", "start"), ("eos", "end"))
}
CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- elif 'image' in part.type -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'video' in part.type -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'audio' in part.type -%}<|audio_start|><|audio_pad|><|audio_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}
"""
CORPUS = [
    "what is the length of x in the triangle",
    "which angle of the shape is the largest",
    "find the area",
]
# 4 to 64 image tokens of 32x32 pixels.
PIXELS: dict[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 4 * 32**2,
    "max_pixels": 64 * 32**2,
}


def text_config(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4}
    return decoder_config(tokenizer, HIDDEN, intermediate_size=2 * HIDDEN, **sizes)


def text_config_2b(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    """The widths of Qwen3-VL-2B-Instruct's decoder, and six of its layers."""
    config = decoder_config(tokenizer, 2048, intermediate_size=6144, num_hidden_layers=6)
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    return config | {"rope_scaling": config["rope_scaling"] | {"mrope_section": [24, 20, 20]}}


def vision_config(out_hidden: int = HIDDEN) -> dict[str, Any]:
    levels = list(range(LEVELS))
    sizes = {"depth": 4, "intermediate_size": 2 * HIDDEN, "deepstack_visual_indexes": levels}
    return nano.vision_config(out_hidden, **sizes)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return byte_level_bpe(CORPUS * 5, 400, SPECIAL, CHAT_TEMPLATE)


def token_ids(tokenizer: transformers.PreTrainedTokenizerFast, **fields: str) -> dict[str, int]:
    """Config fields that hold a special token's id."""
    return {field: tokenizer.convert_tokens_to_ids(SPECIAL[name]) for field, name in fields.items()}


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.08, generator=generator)


def qwen3_vl(out: Path, seed: int = 0, decoder: Any = text_config) -> Path:
    tokenizer = make_tokenizer()
    text = decoder(tokenizer)
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision_config(text["hidden_size"]),
        **token_ids(
            tokenizer,
            image_token_id="image_token",
            video_token_id="video_token",
            vision_start_token_id="vision_bos_token",
            vision_end_token_id="vision_eos_token",
        ),
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).float()
    draw_weights(model, seed)
    model.save_pretrained(out)
    images = transformers.Qwen2VLImageProcessor(**PIXELS, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=16, merge_size=2, temporal_patch_size=2)
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE).save_pretrained(out)
    return out


def qwen3_omni(out: Path, seed: int = 0) -> Path:
    """The thinker, in a checkpoint of the whole model's layout."""
    tokenizer = make_tokenizer()
    # Each token goes to all experts: a choice of some would turn a rounding error into a jump.
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": HIDDEN // 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }
    audio = {
        "d_model": HIDDEN,
        "output_dim": HIDDEN,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * HIDDEN,
        "num_mel_bins": 128,
        "downsample_hidden_size": 32,
        "n_window": 50,
        "n_window_infer": 800,
        "conv_chunksize": 500,
        "max_source_positions": 1500,
    }
    config = transformers.Qwen3OmniMoeConfig(
        enable_audio_output=False,
        thinker_config={
            "text_config": text_config(tokenizer) | experts,
            "vision_config": vision_config() | {"image_size": 256, "apply_vit_abs_pos_embed": True},
            "audio_config": audio,
            "position_id_per_seconds": 13,
            **token_ids(
                tokenizer,
                image_token_id="image_token",
                video_token_id="video_token",
                audio_token_id="audio_token",
                vision_start_token_id="vision_bos_token",
                vision_end_token_id="vision_eos_token",
                audio_start_token_id="audio_bos_token",
                audio_end_token_id="audio_eos_token",
            ),
        },
    )
    thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(
        config.thinker_config
    ).float()
    draw_weights(thinker, seed)
    thinker.save_pretrained(out)  # one tensor an expert, as the checkpoint format has it
    weights = out / "model.safetensors"
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    config.save_pretrained(out)
    Qwen3OmniMoeProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            **PIXELS, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(
            patch_size=16, merge_size=2, temporal_patch_size=2
        ),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    return out


def qwen3_vl_2b(out: Path, seed: int = 0) -> Path:
    return qwen3_vl(out, seed, text_config_2b)


MODELS = {"qwen3_vl": qwen3_vl, "qwen3_omni": qwen3_omni}
LARGER = {"qwen3_vl_2b": qwen3_vl_2b}
"""Of 1.2 GB."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.tiny_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", choices=MODELS | LARGER)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    print((MODELS | LARGER)[args.model](args.out, args.seed))
