"""Checkpoints without weights, in the shapes of released models: vLLM draws the weights.

Shapes are those of the released `config.json` files: Qwen/Qwen3-VL-2B-Instruct,
Qwen/Qwen3-VL-8B-Instruct, Qwen/Qwen3-Omni-30B-A3B-Instruct. The tokenizer is a small one of
our own, of which the decoder's vocabulary is the first part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers.models.qwen3_omni_moe import Qwen3OmniMoeProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor

from benchmarks.geo3k_nano.model import byte_level_bpe

# Attributes under which the processors look their tokens up.
SPECIAL = {f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")} | {
    f"{kind}_{end}_token": f"<|{kind}_{word}|>"
    for kind in ("vision", "audio")
    for end, word in (("bos", "start"), ("eos", "end"))
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PATCH = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"min_pixels": 4 * 32**2, "max_pixels": 1024**2}
VISION: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_heads": 16,
    "num_position_embeddings": 48**2,
}
VISION_2B = VISION | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
VISION_8B = VISION | {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_theta": 5000000.0,
    "rope_scaling": {
        "rope_type": "default",
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
OMNI_LAYERS = 16
"""Of 48: so that four engines fit on a GPU. All 48 have the same shape."""


def qwen3_vl(out: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        **vision_tokens(tokenizer),
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    videos = transformers.Qwen3VLVideoProcessor(**PATCH)
    Qwen3VLProcessor(image_processor(), tokenizer, videos).save_pretrained(out)


def qwen3_omni(out: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
    config = transformers.Qwen3OmniMoeConfig(
        enable_audio_output=False,
        thinker_config={
            "text_config": TEXT | {"rope_theta": 1000000.0} | text,
            "vision_config": vision
            | {
                "out_hidden_size": text["hidden_size"],
                "image_size": 768,
                "apply_vit_abs_pos_embed": True,
            },
            "audio_config": audio | {"encoder_ffn_dim": 5120, "output_dim": text["hidden_size"]},
            "position_id_per_seconds": 13,
            **vision_tokens(tokenizer),
            "audio_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["audio_token"]),
            "audio_start_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["audio_bos_token"]),
            "audio_end_token_id": tokenizer.convert_tokens_to_ids(SPECIAL["audio_eos_token"]),
        },
    )
    config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    Qwen3OmniMoeProcessor(
        image_processor=image_processor(),
        video_processor=transformers.Qwen2VLVideoProcessor(**PATCH),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
    ).save_pretrained(out)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return byte_level_bpe(["what do these images show"], 300, SPECIAL, chat_template="")


def vision_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    fields = {
        "image_token_id": "image_token",
        "video_token_id": "video_token",
        "vision_start_token_id": "vision_bos_token",
        "vision_end_token_id": "vision_eos_token",
    }
    return {field: tokenizer.convert_tokens_to_ids(SPECIAL[name]) for field, name in fields.items()}


def image_processor() -> transformers.Qwen2VLImageProcessor:
    half = [0.5] * 3
    return transformers.Qwen2VLImageProcessor(**PATCH, **PIXELS, image_mean=half, image_std=half)


Shape = tuple[
    Callable[[Path, dict[str, Any], dict[str, Any]], None], dict[str, Any], dict[str, Any]
]
SHAPES: dict[str, Shape] = {
    "qwen3_vl_2b": (
        qwen3_vl,
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 6144,
            "tie_word_embeddings": True,
        },
        VISION_2B,
    ),
    "qwen3_vl_8b": (
        qwen3_vl,
        {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
            "tie_word_embeddings": False,
        },
        VISION_8B,
    ),
    "qwen3_omni": (
        qwen3_omni,
        {
            "hidden_size": 2048,
            "num_hidden_layers": OMNI_LAYERS,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        },
        VISION_8B,
    ),
}


def write(name: str, folder: Path) -> Path:
    """The checkpoint of that shape, in a folder of its name."""
    make, text, vision = SHAPES[name]
    make(folder / name, text, vision)
    return folder / name
