import pytest
import torch
from transformers import Granite4VisionConfig, Qwen3Config

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.models.granite4_vision import (
    Granite4VisionForConditionalGeneration,
)
from vllm.model_executor.models.moss_audio import (
    MossAudioConfig,
    MossAudioEncoderConfig,
    MossAudioModel,
)

HIDDEN_SIZE, MEDIA_TOKEN_ID = 64, 11


def make_model(model_class, path, config):
    Qwen3Config().save_pretrained(path)
    config.architectures = [model_class.__name__]
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(path),
            hf_overrides=lambda _: config,
            dtype="float32",
            skip_tokenizer_init=True,
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        return model_class(vllm_config=vllm_config)


def embed(model, media):
    """Embed `media`, `prompt_embeds` for one token, and a text token."""
    media_ids = [MEDIA_TOKEN_ID] * sum(map(len, media))
    return model.embed_input_ids(
        torch.tensor([*media_ids, 0, 0]),
        [*media, torch.full((1, HIDDEN_SIZE), 2.0)],
        is_multimodal=torch.tensor([True] * (len(media_ids) + 1) + [False]),
    )


@pytest.mark.parametrize("with_image", [True, False])
@torch.inference_mode()
def test_granite4_vision_prompt_embeds(dist_init, tmp_path, monkeypatch, with_image):
    tiny = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
    }
    config = Granite4VisionConfig(
        text_config=tiny
        | {"model_type": "granite", "vocab_size": 16, "embedding_multiplier": 3.0},
        vision_config=tiny | {"model_type": "siglip_vision_model"},
        image_token_index=MEDIA_TOKEN_ID,
        downsample_rate="4/8",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1],
    )
    model = make_model(Granite4VisionForConditionalGeneration, tmp_path, config)
    monkeypatch.setattr(
        model.language_model.model,
        "forward",
        lambda deepstack_input_embeds, **_: torch.stack(
            list(deepstack_input_embeds.tensors.values())
        ),
    )
    image = [torch.full((2, HIDDEN_SIZE * 2), 5.0)] if with_image else []

    inputs_embeds = embed(model, image)
    levels = model(None, torch.arange(len(inputs_embeds)), inputs_embeds=inputs_embeds)

    # As a token's embedding, it is scaled. An image has none.
    assert inputs_embeds[-2].eq(2 * 3).all() and not inputs_embeds[:-2].any()
    assert levels[:, :-2].eq(5).all() and not levels[:, -2:].any()


@torch.inference_mode()
def test_moss_audio_prompt_embeds(dist_init, tmp_path, monkeypatch):
    tiny = {"num_hidden_layers": 0, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = MossAudioConfig(
        audio_config=MossAudioEncoderConfig(
            d_model=8,
            encoder_layers=0,
            encoder_attention_heads=1,
            deepstack_encoder_layer_indexes=[0],
        ),
        language_config=Qwen3Config(hidden_size=HIDDEN_SIZE, vocab_size=16, **tiny),
    )
    model = make_model(MossAudioModel, tmp_path, config)
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda *_, deepstack_input_embeds, **__: torch.stack(
            list(deepstack_input_embeds.tensors.values())
        ),
    )
    audio = [torch.full((2, HIDDEN_SIZE * 2), 5.0)]

    inputs_embeds = embed(model, audio)
    levels = model(None, torch.arange(4), inputs_embeds=inputs_embeds)

    assert inputs_embeds[:2].eq(5).all() and inputs_embeds[2].eq(2).all()
    assert levels[:, :2].eq(5).all() and not levels[:, 2:].any()
