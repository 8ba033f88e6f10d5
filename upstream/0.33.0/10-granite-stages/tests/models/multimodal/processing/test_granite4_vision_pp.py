from types import SimpleNamespace

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
from vllm.model_executor.models import granite4_vision

IMAGE_TOKEN_ID, HIDDEN_SIZE = 11, 64


@torch.inference_mode()
@pytest.mark.parametrize("has_tower", [True, False])
def test_deepstack_features_reach_later_pp_ranks(
    dist_init, tmp_path, monkeypatch, has_tower
):
    """A rank expects what the one before sends, and gets it as it was staged."""
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
            str(tmp_path),
            dtype="float32",
            skip_tokenizer_init=True,
            limit_mm_per_prompt={"image": int(has_tower)},
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        model = granite4_vision.Granite4VisionForConditionalGeneration(
            vllm_config=vllm_config
        )
    decoder = model.language_model.model

    # Layers 0 and 1 add features. The first rank has layer 0.
    first_rank = SimpleNamespace(is_first_rank=True, is_last_rank=False)
    monkeypatch.setattr(granite4_vision, "get_pp_group", lambda: first_rank)
    monkeypatch.setattr(decoder, "end_layer", 1)
    input_ids = torch.tensor([0, IMAGE_TOKEN_ID])
    inputs_embeds = None  # of an engine of text alone
    if has_tower:
        inputs_embeds = model.embed_input_ids(
            input_ids,
            [torch.ones(1, HIDDEN_SIZE * 2)],
            is_multimodal=input_ids == IMAGE_TOKEN_ID,
        )
    sent = model(input_ids, torch.arange(2), inputs_embeds=inputs_embeds).tensors

    monkeypatch.setattr(decoder, "start_layer", 1)
    expected = model.make_empty_intermediate_tensors(2, torch.float32, "cpu").tensors
    assert sent.keys() == expected.keys()
    if has_tower:
        assert not sent["ds_1"][0].any() and sent["ds_1"][1].eq(1).all()
