import pytest
import torch
from transformers import Granite4VisionConfig

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

IMAGE_TOKEN_ID, HIDDEN_SIZE = 11, 64


@pytest.fixture
def model(dist_init, tmp_path, monkeypatch):
    """A tiny model whose decoder returns the DeepStack features that it is given."""
    tiny = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 0,
        "num_attention_heads": 1,
    }
    Granite4VisionConfig(
        text_config=tiny | {"model_type": "granite", "vocab_size": 16},
        vision_config=tiny | {"model_type": "siglip_vision_model"},
        image_token_index=IMAGE_TOKEN_ID,
        downsample_rate="4/8",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1],
        architectures=["Granite4VisionForConditionalGeneration"],
    ).save_pretrained(tmp_path)
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(tmp_path), dtype="float32", skip_tokenizer_init=True
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        model = Granite4VisionForConditionalGeneration(vllm_config=vllm_config)
    monkeypatch.setattr(
        model.language_model.model,
        "forward",
        lambda deepstack_input_embeds, **_: torch.stack(
            list(deepstack_input_embeds.tensors.values())
        ),
    )
    return model


@torch.inference_mode()
def test_image_features_end_with_their_step(model):
    """Also when a CUDA graph is replayed for the step, which skips forward()."""
    input_ids = torch.tensor([0, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID])
    is_multimodal = input_ids == IMAGE_TOKEN_ID
    image = torch.ones(2, HIDDEN_SIZE * 2)
    inputs_embeds = model.embed_input_ids(
        input_ids, [image], is_multimodal=is_multimodal
    )
    positions = torch.arange(3)
    assert model(None, positions, inputs_embeds=inputs_embeds)[:, is_multimodal].all()

    model.embed_input_ids(input_ids, [image], is_multimodal=is_multimodal)
    inputs_embeds = model.embed_input_ids(torch.zeros_like(input_ids))
    assert not model(None, positions, inputs_embeds=inputs_embeds).any()
