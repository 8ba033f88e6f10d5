import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    TokenizersBackend,
)

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

VOCAB = ["a", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEXT_TOKEN_ID, IMAGE_TOKEN_ID = 0, 1


@pytest.fixture
def hf_model(tmp_path):
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = Qwen3VLConfig(
        text_config=tiny
        | {"num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16}
        | {"num_key_value_heads": 1, "vocab_size": 16, "rope_parameters": rope},
        vision_config=tiny
        | {"depth": 2, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16}
        | {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE_TOKEN_ID,
    )
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(VOCAB)}))
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(),
        TokenizersBackend(tokenizer_object=tokenizer),
        Qwen3VLVideoProcessor(),
    ).save_pretrained(tmp_path)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    return model.model


@torch.inference_mode()
def test_transformers_backend_deepstack(dist_init, tmp_path, hf_model):
    """Hidden states of an image, and of a text after it, are those of Transformers."""
    image = torch.tensor([TEXT_TOKEN_ID] + [IMAGE_TOKEN_ID] * 4 + [TEXT_TOKEN_ID])
    text = torch.full_like(image, TEXT_TOKEN_ID)
    positions = torch.arange(len(image)).expand(3, -1)
    pixels = {
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    # Before vLLM decorates the decoder's class
    expected = [
        hf_model(ids[None], position_ids=positions[:, None], **inputs).last_hidden_state
        for ids, inputs in ((image, pixels), (text, {}))
    ]

    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(tmp_path), dtype="float32", model_impl="transformers"
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        model = get_model(vllm_config=vllm_config)
    # Without a KV cache
    model.text_config._attn_implementation = "sdpa"
    encoded = model.embed_multimodal(**pixels, num_image_patches=torch.tensor([4]))

    for ids, embeddings, hidden_states in (
        (image, encoded, expected[0]),
        (text, [], expected[1]),
    ):
        inputs_embeds = model.embed_input_ids(
            ids, embeddings, is_multimodal=ids == IMAGE_TOKEN_ID
        )
        with set_forward_context(None, vllm_config):
            served = model(None, positions, inputs_embeds=inputs_embeds)
        torch.testing.assert_close(served, hidden_states[0])
