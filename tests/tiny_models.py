"""Tiny Qwen3-VL and Qwen3-Omni checkpoints, complete, with weights drawn from a seed.

    python -m tests.tiny_models qwen3_vl OUT_DIR [SEED]

Four decoder layers of hidden size 128, three DeepStack levels, float32. Weights are drawn
wide enough that every branch of the model moves the logits (of a scale of about 3).
"""

from __future__ import annotations

import argparse
import json
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
MOSS_AUDIO_CONFIG = """
from transformers import PreTrainedConfig, Qwen3Config


class MossAudioConfig(PreTrainedConfig):
    model_type = "moss_audio"
    sub_configs = {"language_config": Qwen3Config}

    def __init__(self, audio_config=None, language_config=None, **kwargs):
        self.audio_config = audio_config or {}
        self.language_config = Qwen3Config(**(language_config or {}))
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        return self.language_config
"""
# Released checkpoints bring the two modules, too.
ERNIE_CONFIG = """
from transformers import PreTrainedConfig


class ErnieConfig(PreTrainedConfig):
    model_type = "ernie4_5_moe_vl"

    def __init__(self, vision_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PreTrainedConfig(**(vision_config or {}))
"""
ERNIE_PROCESSOR = """
from transformers import BatchFeature, ProcessorMixin, Qwen2VLImageProcessor


class ErnieProcessor(ProcessorMixin):
    spatial_conv_size = temporal_conv_size = 2

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        size = {"min_pixels": 4 * 28**2, "max_pixels": 64 * 28**2}
        patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 1}
        raw = {"do_rescale": False, "do_normalize": False}  # vLLM does both
        self.image_processor = Qwen2VLImageProcessor(**size, **patches, **raw)
        self.image_processor.size |= size

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        given = {"images": None}
        if images:
            found = self.image_processor(images=images, return_tensors="pt")
            given = {"images": found["pixel_values"], "grid_thw": found["image_grid_thw"]}
        return BatchFeature({"input_ids": self.tokenizer(text)["input_ids"], **given}, "pt")
"""
CORPUS = [
    "what is the length of x in the triangle",
    "which angle of the shape is the largest",
    "find the area",
]
PATCHES: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
# 4 to 64 image tokens of 32x32 pixels.
PIXELS = PATCHES | {"min_pixels": 4 * 32**2, "max_pixels": 64 * 32**2}
HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN_TOKENS = {
    "image_token_id": "image_token",
    "video_token_id": "video_token",
    "vision_start_token_id": "vision_bos_token",
    "vision_end_token_id": "vision_eos_token",
}
# Each token goes to all experts: a choice of some would turn a rounding error into a jump.
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": HIDDEN // 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}


def text_config(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4}
    return decoder_config(tokenizer, HIDDEN, intermediate_size=2 * HIDDEN, **sizes)


def text_config_2b(
    tokenizer: transformers.PreTrainedTokenizerFast,
    hidden: int = 2048,
    intermediate: int = 6144,
    heads: int = 16,
) -> dict[str, Any]:
    """The widths of Qwen3-VL-2B-Instruct's decoder, and six of its layers."""
    config = decoder_config(tokenizer, hidden, intermediate_size=intermediate, num_hidden_layers=6)
    config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return config | {"rope_scaling": config["rope_scaling"] | {"mrope_section": [24, 20, 20]}}


def text_config_8b(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    """The same of Qwen3-VL-8B-Instruct's."""
    return text_config_2b(tokenizer, 4096, 12288, 32)


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
        **token_ids(tokenizer, **QWEN_TOKENS),
    )
    return write_qwen(transformers.Qwen3VLForConditionalGeneration(config), tokenizer, out, seed)


def qwen3_vl_assisted(out: Path, seed: int = 0) -> Path:
    """Qwen3-VL, and in folders of its own what serves beside it: LoRA adapters of the decoder and
    of the tower, a draft model and an EAGLE3 head."""
    qwen3_vl(out, seed)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(seed + 1)
    write_adapter(tensors, "model.language_model.layers.", out / "decoder_adapter", generator)
    write_adapter(tensors, "model.visual.", out / "tower_adapter", generator)
    text = text_config(make_tokenizer())
    text.pop("rope_scaling")
    # The target's own decoder: of text, all that it drafts is right; of images, not all.
    draft = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text)).float()
    decoder = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.visual.")
    }
    draft.load_state_dict(decoder)
    draft.save_pretrained(out / "draft")
    write_eagle3(text, out / "eagle3", generator)
    return out


def write_eagle3(text: dict[str, Any], out: Path, generator: torch.Generator) -> None:
    """A head of one layer, drawn at random: hardly any of its drafts is right. It reads what the
    layers that add a level give."""
    config = transformers.LlamaConfig(
        **text | {"num_hidden_layers": 1},
        architectures=["Eagle3Qwen3vlForCausalLM"],
        draft_vocab_size=text["vocab_size"],
        eagle_aux_hidden_state_layer_ids=list(range(1, LEVELS + 1)),
    )
    config.save_pretrained(out)
    layer = transformers.LlamaForCausalLM(config).model.layers[0].float()
    for name in "qkv":  # of a token's embedding beside what the target made of it
        projection = getattr(layer.self_attn, f"{name}_proj")
        projection.weight.data = torch.empty(projection.out_features, 2 * HIDDEN)
    draw_weights(layer, generator.initial_seed())
    tensors = {f"midlayer.{name}": tensor for name, tensor in layer.state_dict().items()}
    for name, rows in (("fc", HIDDEN), ("lm_head", text["vocab_size"])):
        columns = LEVELS * HIDDEN if name == "fc" else HIDDEN
        tensors[f"{name}.weight"] = 0.08 * torch.randn(rows, columns, generator=generator)
    for name in ("midlayer.hidden_norm", "norm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def write_adapter(
    tensors: dict[str, torch.Tensor], prefix: str, out: Path, generator: torch.Generator
) -> None:
    """An adapter, as PEFT writes it, of all linear layers whose names begin with `prefix`."""
    drawn: dict[str, torch.Tensor] = {}
    layers: set[str] = set()
    for name, weight in tensors.items():
        if name.startswith(prefix) and weight.dim() == 2 and "pos_embed" not in name:
            layers.add(name.split(".")[-2])
            module = "base_model.model." + name.removesuffix("weight")
            for end, shape in (("A", (8, weight.shape[1])), ("B", (weight.shape[0], 8))):
                drawn[f"{module}lora_{end}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    out.mkdir()
    save_file(drawn, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": sorted(layers)}
    (out / "adapter_config.json").write_text(json.dumps(config))


def write_qwen(
    model: Any, tokenizer: transformers.PreTrainedTokenizerFast, out: Path, seed: int
) -> Path:
    model.float()
    draw_weights(model, seed)
    model.save_pretrained(out)
    write_qwen_processor(tokenizer, out)
    return out


def write_qwen_processor(tokenizer: transformers.PreTrainedTokenizerFast, out: Path) -> None:
    images = transformers.Qwen2VLImageProcessor(**PIXELS, **HALF)
    videos = transformers.Qwen3VLVideoProcessor(**PATCHES)
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE).save_pretrained(out)


def qwen2_5_vl(out: Path, seed: int = 0) -> Path:
    """A vision model that has no DeepStack."""
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

    tokenizer = make_tokenizer()
    text = text_config(tokenizer)
    text.pop("head_dim")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "intermediate_size": 2 * HIDDEN,
    }
    vision |= {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [1], "patch_size": 14}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **token_ids(tokenizer, **QWEN_TOKENS)
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float()
    draw_weights(model, seed)
    model.save_pretrained(out)
    images = transformers.Qwen2VLImageProcessor(min_pixels=4 * 28**2, max_pixels=64 * 28**2)
    videos = transformers.Qwen2VLVideoProcessor()
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(out)
    return out


def qwen3_omni(out: Path, seed: int = 0, dense: bool = False) -> Path:
    """The thinker, in a checkpoint of the whole model's layout; `dense`: its layers have no
    experts, which some processors cannot run."""
    tokenizer = make_tokenizer()
    text = text_config(tokenizer) | EXPERTS
    if dense:
        text["mlp_only_layers"] = list(range(text["num_hidden_layers"]))
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
            "text_config": text,
            "vision_config": vision_config() | {"image_size": 256, "apply_vit_abs_pos_embed": True},
            "audio_config": audio,
            "position_id_per_seconds": 13,
            **token_ids(
                tokenizer,
                **QWEN_TOKENS,
                audio_token_id="audio_token",
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
        image_processor=transformers.Qwen2VLImageProcessor(**PIXELS, **HALF),
        video_processor=transformers.Qwen2VLVideoProcessor(**PATCHES),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    return out


def qwen3_vl_moe(out: Path, seed: int = 0) -> Path:
    tokenizer = make_tokenizer()
    config = transformers.Qwen3VLMoeConfig(
        text_config=text_config(tokenizer) | EXPERTS | {"moe_intermediate_size": 96},
        vision_config=vision_config(),
        **token_ids(tokenizer, **QWEN_TOKENS),
    )
    write_qwen(transformers.Qwen3VLMoeForConditionalGeneration(config), tokenizer, out, seed)
    # Of experts, released checkpoints have inputs before outputs; `save_pretrained` has not.
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if ".mlp.experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def cohere_compass(out: Path, seed: int = 0) -> Path:
    """Two of its four layers attend to a window; two have no positions."""
    from transformers.models.cohere_compass import CohereCompassProcessor

    upper = {attribute: token.upper() for attribute, token in SPECIAL.items()}
    template = CHAT_TEMPLATE
    for token in SPECIAL.values():
        template = template.replace(token, token.upper())
    tokenizer = byte_level_bpe(CORPUS * 5, 400, upper, template)
    text = text_config(tokenizer)
    rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text.pop("head_dim")
    layers = ["sliding_attention", "full_attention"]
    config = transformers.CohereCompassConfig(
        text_config=text
        | {
            "tie_word_embeddings": True,
            "layer_types": layers * 2,
            "sliding_window": 64,
            "logit_scale": 1.0,
        }
        | {"rope_parameters": {"sliding_attention": rope, "full_attention": None}},
        vision_config=vision_config(),
        tie_word_embeddings=True,
        **{
            field: tokenizer.convert_tokens_to_ids(upper[name])
            for field, name in QWEN_TOKENS.items()
        },
    )
    model = transformers.CohereCompassForConditionalGeneration(config).float()
    draw_weights(model, seed)
    model.save_pretrained(out)
    images = transformers.CohereCompassImageProcessor(**PIXELS, **HALF)
    videos = transformers.CohereCompassVideoProcessor(**PATCHES)
    processor = CohereCompassProcessor(images, tokenizer, videos, chat_template=template)
    processor.save_pretrained(out)
    return out


def granite4_vision(out: Path, seed: int = 0) -> Path:
    """A level for each of six layers: two of encoder layers, four of spatial offsets."""
    tokenizer = make_tokenizer()
    text = text_config(tokenizer) | {"num_hidden_layers": 6}
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    for other in ("rope_scaling", "head_dim"):
        text.pop(other)
    vision = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    config = transformers.Granite4VisionConfig(
        text_config=text | {"model_type": "granite4_vision_text", "rope_parameters": rope},
        vision_config=vision
        | {"model_type": "siglip_vision_model", "num_hidden_layers": 2}
        | {"image_size": 64, "patch_size": 16},
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1}
        | {"hidden_size": 128, "intermediate_size": 3072, "encoder_hidden_size": 128}
        | {"num_attention_heads": 2, "cross_attention_frequency": 1},
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image_token"]),
        image_grid_pinpoints=[[64, 64], [64, 128], [128, 64]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        use_spatial_sampling=True,
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 3, 4, 5],
    )
    model = transformers.Granite4VisionForConditionalGeneration(config).float()
    draw_weights(model, seed)
    model.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")  # with the names of released checkpoints
    tensors = {
        name.replace(".vision_tower.", ".vision_tower.vision_model."): tensor
        for name, tensor in tensors.items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    from transformers.models.granite4_vision import Granite4VisionProcessor

    images = transformers.LlavaNextImageProcessor(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=HALF["image_mean"],
        image_std=HALF["image_std"],
    )
    Granite4VisionProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", ""),
    ).save_pretrained(out)
    return out


def moss_audio(out: Path, seed: int = 0) -> Path:
    """A configuration and a tokenizer: vLLM makes the weights, with `--load-format dummy`.

    The configuration's class comes with it, as Transformers has none. The audio token's id is
    fixed, and large.
    """
    out.mkdir(parents=True)
    make_tokenizer().save_pretrained(out)
    tokens = {"audio_token_id": 151654, "audio_start_id": 151669, "audio_end_id": 151670}
    audio = {
        "d_model": HIDDEN,
        "output_dim": HIDDEN,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": HIDDEN,
        "downsample_hidden_size": 32,
        "deepstack_encoder_layer_indexes": list(range(LEVELS)),
    }
    language = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 151680,
        "max_position_embeddings": 4096,
    }
    config = {
        "model_type": "moss_audio",
        "architectures": ["MossAudioModel"],
        "auto_map": {"AutoConfig": "configuration_moss_audio.MossAudioConfig"},
        "audio_config": audio,
        "language_config": language,
        "adapter_hidden_size": HIDDEN,
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "processor_config.json").write_text(json.dumps(tokens))
    (out / "configuration_moss_audio.py").write_text(MOSS_AUDIO_CONFIG)
    return out


def ernie4_5_vl(out: Path, seed: int = 0, **widths: Any) -> Path:
    """As `moss_audio`, with a processor. Experts of text and of vision, and tokens go to all."""
    out.mkdir(parents=True)
    marks = ["<|IMAGE_START|>", "<|image@placeholder|>", "<|IMAGE_END|>"]
    marks += ["<|IMAGE_PLACEHOLDER|>", "<|VIDEO_START|>", "<|video@placeholder|>", "<|VIDEO_END|>"]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.save_pretrained(out)
    vision = {"depth": 2, "hidden_size": HIDDEN, "embed_dim": HIDDEN, "num_heads": 4}
    vision |= {"mlp_ratio": 2, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2}
    experts: dict[str, Any] = {"moe_num_experts": [4, 4], "moe_k": 4, "moe_num_shared_experts": 1}
    experts |= {"moe_intermediate_size": [64, 32], "moe_layer_interval": 1}
    experts |= {"moe_layer_start_index": [1, 1], "moe_layer_end_index": [3, 3]}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pixel_hidden_size": HIDDEN}
    auto = {"AutoConfig": "ernie.ErnieConfig", "AutoProcessor": "ernie_processor.ErnieProcessor"}
    config = {
        "model_type": "ernie4_5_moe_vl",
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "auto_map": auto,
        "vision_config": vision,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,  # over several stages, vLLM cannot tie them
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rope_theta": 500000.0,
        "freq_allocation": 8,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "im_patch_id": tokenizer.convert_tokens_to_ids(marks[3]),
        "image_start_token_id": tokenizer.convert_tokens_to_ids(marks[0]),
        "image_end_token_id": tokenizer.convert_tokens_to_ids(marks[2]),
    }
    (out / "config.json").write_text(json.dumps(config | sizes | experts | widths))
    (out / "processor_config.json").write_text(
        json.dumps({"processor_class": "ErnieProcessor", "auto_map": auto})
    )
    (out / "ernie.py").write_text(ERNIE_CONFIG)
    (out / "ernie_processor.py").write_text(ERNIE_PROCESSOR)
    return out


def ernie4_5_vl_28b(out: Path, seed: int = 0) -> Path:
    """The widths of ERNIE-4.5-VL-28B-A3B's decoder, and six of its layers."""
    experts = {"moe_num_experts": [64, 64], "moe_k": 6, "moe_num_shared_experts": 2}
    experts |= {"moe_intermediate_size": [1536, 512], "moe_layer_end_index": [5, 5]}
    heads = {"num_attention_heads": 20, "num_key_value_heads": 4, "freq_allocation": 20}
    sizes = {"hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 6}
    return ernie4_5_vl(out, seed, **experts, **heads, **sizes, vocab_size=103424)


def qwen3_vl_2b(out: Path, seed: int = 0) -> Path:
    return qwen3_vl(out, seed, text_config_2b)


def qwen3_vl_8b(out: Path, seed: int = 0) -> Path:
    return qwen3_vl(out, seed, text_config_8b)


MODELS = {"qwen3_vl": qwen3_vl, "qwen3_omni": qwen3_omni}
OTHERS = {
    "qwen3_vl_assisted": qwen3_vl_assisted,
    "qwen3_vl_moe": qwen3_vl_moe,
    "cohere_compass": cohere_compass,
    "granite4_vision": granite4_vision,
    "moss_audio": moss_audio,
    "ernie4_5_vl": ernie4_5_vl,
    "qwen3_vl_2b": qwen3_vl_2b,  # of 1.2 GB
    "qwen3_vl_8b": qwen3_vl_8b,  # of 4.8 GB
    "ernie4_5_vl_28b": ernie4_5_vl_28b,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.tiny_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", choices=MODELS | OTHERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    print((MODELS | OTHERS)[args.model](args.out, args.seed))
