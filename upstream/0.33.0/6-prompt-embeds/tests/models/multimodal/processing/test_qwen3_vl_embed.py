import pytest
import torch
from transformers import Qwen3VLConfig

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.model_executor.models.cohere_compass import (
    CohereCompassForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal.utils import set_mm_embedding_modality

HIDDEN_SIZE, IMAGE_TOKEN_ID = 8, 11


@torch.inference_mode()
@pytest.mark.parametrize("with_image", [True, False])
def test_prompt_embeds_have_no_deepstack_features(
    dist_init, tmp_path, monkeypatch, with_image
):
    """They come among the images' embeddings, as wide as the decoder alone."""
    tiny = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": 1}
    Qwen3VLConfig(
        text_config=tiny
        | {"num_hidden_layers": 0, "num_key_value_heads": 1, "vocab_size": 16},
        vision_config=tiny
        | {"depth": 0, "num_heads": 1, "out_hidden_size": HIDDEN_SIZE}
        | {"deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE_TOKEN_ID,
        architectures=["Qwen3VLForConditionalGeneration"],
    ).save_pretrained(tmp_path)
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(tmp_path), dtype="float32", skip_tokenizer_init=True
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        model = Qwen3VLForConditionalGeneration(vllm_config=vllm_config)
    monkeypatch.setattr(
        model.language_model.model,
        "forward",
        lambda deepstack_input_embeds, **_: torch.stack(
            list(deepstack_input_embeds.tensors.values())
        ),
    )
    image = torch.full((2, HIDDEN_SIZE * 3), 2.0)
    prompt_embeds = torch.full((1, HIDDEN_SIZE), 3.0)
    images = [image] if with_image else []
    input_ids = torch.tensor([IMAGE_TOKEN_ID] * 2 * with_image + [0, 0])
    is_multimodal = torch.tensor([True] * 2 * with_image + [True, False])

    inputs_embeds = model.embed_input_ids(
        input_ids, [*images, prompt_embeds], is_multimodal=is_multimodal
    )
    deepstack = model(None, torch.arange(len(input_ids)), inputs_embeds=inputs_embeds)

    is_image = input_ids == IMAGE_TOKEN_ID
    assert inputs_embeds[is_image].eq(2).all() and deepstack[:, is_image].eq(2).all()
    assert inputs_embeds[-2].eq(3).all() and deepstack[:, ~is_image].eq(0).all()


@pytest.mark.parametrize(
    "model_class",
    [CohereCompassForConditionalGeneration, Qwen3VLForConditionalGeneration],
)
@pytest.mark.parametrize("with_image", [True, False])
def test_prompt_embeds_have_no_positions(model_class, with_image):
    """With video pruning, media embeddings end in five columns of positions."""
    vision_start_token_id = 12
    input_ids = [0, vision_start_token_id, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 0]
    image = torch.full((2, HIDDEN_SIZE + 5), 2.0)
    image[:, HIDDEN_SIZE:] = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    prompt_embeds = set_mm_embedding_modality(
        torch.full((1, HIDDEN_SIZE), 3.0), "prompt_embeds"
    )

    def recompute(embeddings):
        return model_class._recompute_mrope_positions(
            input_ids,
            embeddings,
            mrope_positions=torch.arange(len(input_ids)).expand(3, -1),
            num_computed_tokens=0,
            vision_start_token_id=vision_start_token_id,
            image_token_id=IMAGE_TOKEN_ID,
            video_token_id=13,
        )

    images = [image] if with_image else []
    (*out, text), positions, delta = recompute([*images, prompt_embeds])
    expected, *expected_positions = recompute(images)

    assert torch.equal(text, prompt_embeds)
    torch.testing.assert_close([out, positions, delta], [expected, *expected_positions])
