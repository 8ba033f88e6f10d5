import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedConfig, Qwen3Config

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.ernie45_vl import (
    Ernie4_5_VLMoeForConditionalGeneration,
)
from vllm.model_executor.models.ernie45_vl_moe import Ernie4_5_VLMoeMoE
from vllm.platforms import current_platform

HIDDEN_SIZE, TEXT_TOKEN_ID, IMAGE_TOKEN_ID = 8, 0, 11
TEXT = torch.tensor([TEXT_TOKEN_ID, TEXT_TOKEN_ID])
IMAGE = torch.tensor([TEXT_TOKEN_ID, IMAGE_TOKEN_ID])


@pytest.fixture
def vllm_config(tmp_path):
    tiny = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": 1, "rms_norm_eps": 1e-6}
    Qwen3Config().save_pretrained(tmp_path)
    config = PreTrainedConfig(
        **tiny,
        num_hidden_layers=0,
        num_key_value_heads=1,
        vocab_size=16,
        max_position_embeddings=64,
        hidden_act="silu",
        tie_word_embeddings=False,
        pixel_hidden_size=HIDDEN_SIZE,
        spatial_conv_size=2,
        temporal_conv_size=2,
        use_temporal_conv=False,
        im_patch_id=IMAGE_TOKEN_ID,
        moe_num_experts=[2, 2],
        moe_k=1,
        moe_intermediate_size=[8, 8],
        moe_layer_start_index=[0, 0],
        moe_layer_end_index=[0, 0],
        vision_config=PreTrainedConfig(
            depth=0,
            hidden_size=HIDDEN_SIZE,
            embed_dim=HIDDEN_SIZE,
            num_heads=1,
            mlp_ratio=1,
            in_channels=3,
            patch_size=4,
            spatial_merge_size=2,
        ),
        architectures=["Ernie4_5_VLMoeForConditionalGeneration"],
    )
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(tmp_path),
            hf_overrides=lambda _: config,
            dtype="float32",
            skip_tokenizer_init=True,
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        yield vllm_config


@pytest.fixture
def model(dist_init, vllm_config, monkeypatch):
    """A tiny model whose decoder returns which tokens are visual."""
    model = Ernie4_5_VLMoeForConditionalGeneration(vllm_config=vllm_config)
    monkeypatch.setattr(
        model.language_model.model,
        "forward",
        lambda visual_token_mask=None, **_: visual_token_mask,
    )
    return model


@torch.inference_mode()
def test_visual_token_mask_is_of_its_step(model):
    """Also when a CUDA graph is replayed for a step, which skips forward(), and on a
    later pipeline parallel rank, which embeds nothing."""
    image = torch.ones(1, HIDDEN_SIZE)
    model.embed_input_ids(IMAGE, [image], is_multimodal=IMAGE == IMAGE_TOKEN_ID)
    inputs_embeds = model.embed_input_ids(TEXT[:1])
    positions = torch.arange(2)
    mask = model(TEXT[:1], positions[:1], inputs_embeds=inputs_embeds)
    assert mask.tolist() == [[False]]
    assert model(IMAGE, positions).tolist() == [[False], [True]]


@torch.inference_mode()
def test_visual_token_mask_is_in_dummy_runs(model):
    """Or CUDA graphs would be captured without vision experts."""
    inputs_embeds = torch.zeros(2, HIDDEN_SIZE)
    mask = model(TEXT, torch.arange(2), inputs_embeds=inputs_embeds)
    assert mask.tolist() == [[False], [False]]


class Experts(torch.nn.Module):
    """Stand in for the kernels."""

    def __init__(self, *, prefix: str, **_):
        super().__init__()
        self.factor = 2 if "text_experts" in prefix else 3

    def forward(self, hidden_states, router_logits):
        return hidden_states * self.factor


@torch.no_grad()
def test_captured_experts_are_those_of_the_replay(dist_init, vllm_config, monkeypatch):
    module = "vllm.model_executor.models.ernie45_vl_moe"
    monkeypatch.setattr(f"{module}.FusedMoEFactory", Experts)
    moe = Ernie4_5_VLMoeMoE(vllm_config.model_config.hf_config, prefix="layers.0.mlp")
    for gate in (moe.text_experts_gate, moe.vision_experts_gate):
        monkeypatch.setattr(gate, "forward", lambda states: (states, None))
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    hidden_states = torch.ones(2, HIDDEN_SIZE)
    with set_forward_context({}, vllm_config):
        graph = make_fx(moe)(hidden_states, torch.tensor([[False], [False]]))
    output = graph(hidden_states, torch.tensor([[False], [True]]))

    assert output.tolist() == [[2.0] * HIDDEN_SIZE, [3.0] * HIDDEN_SIZE]
