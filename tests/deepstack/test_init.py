"""vLLM's own `__init__`s, of tiny models without weights: which buffers there are.

For releases whose CPU kernels load beside the PyTorch that is installed, or that have none.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests import tiny_models

from .bare_models import LEVELS, OMNI, buffers_of

bites = pytest.mark.bites
TOKENS = 512
CHECKPOINTS = {"qwen3_vl": tiny_models.qwen3_vl, OMNI: tiny_models.qwen3_omni}
NO_TOWER = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
MOSS_AUDIO = {
    "audio_config": {
        "d_model": 64,
        "output_dim": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "downsample_hidden_size": 16,
        "deepstack_encoder_layer_indexes": [0, 1],
    },
    "language_config": {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
    "adapter_hidden_size": 64,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def engine_config(checkpoints):
    """A `VllmConfig` as an engine has it. The first one starts the groups, experts' included."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    def make(name: str, **options):
        options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | options
        args = EngineArgs(model=str(checkpoints[name]), max_num_batched_tokens=TOKENS, **options)
        return args.create_engine_config()

    with set_current_vllm_config(make(OMNI)):
        init = f"file://{checkpoints[OMNI] / 'init'}"
        parallel_state.init_distributed_environment(1, 0, init, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    yield make
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def initialize(config):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(config):
        return initialize_model(config)


@pytest.fixture(params=CHECKPOINTS)
def name(request):
    return request.param


def made_by(model) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(buffer.shape), buffer.device.type) for buffer in buffers_of(model)]


EXPECTED = [((TOKENS, tiny_models.HIDDEN), "cpu")] * LEVELS


@bites("stock", "pr43617", "newest")
def test_with_a_tower(name, engine_config):
    """D7: registered, and not in a checkpoint."""
    model = initialize(engine_config(name))
    assert made_by(model) == EXPECTED
    found = [buffer for key, buffer in model.named_buffers() if "deepstack" in key]
    assert [tuple(buffer.shape) for buffer in found] == [shape for shape, _ in EXPECTED]
    assert not any("deepstack_input" in key for key in model.state_dict())


@bites("pr43617")
def test_without_a_tower(name, engine_config):
    """D3: a text-only engine has no buffers, and its decoder no such inputs."""
    model = initialize(engine_config(name, **NO_TOWER))
    assert model._get_deepstack_input_embeds(5) is None


@bites("stock", "pr43617", "newest")
def test_without_a_tower_and_sent_embeddings(name, engine_config):
    """D15."""
    model = initialize(engine_config(name, **NO_TOWER, enable_mm_embeds=True))
    assert model.use_deepstack
    assert made_by(model) == EXPECTED


@bites("stock", "pr43617")  # in 0.33.0 the limits are part of it
def test_compiled_decoders_are_shared_with_none_that_differs(name, engine_config):
    """D20: by the key under which vLLM keeps them."""
    limits = [{}, NO_TOWER, NO_TOWER | {"enable_mm_embeds": True}]
    keys = []
    for options in limits:
        config = engine_config(name, **options)
        released = config.compute_hash()
        initialize(config)
        assert config.compute_hash() != released
        keys.append(config.compute_hash())
    assert len(set(keys)) == len(limits)


@pytest.fixture
def no_amx(monkeypatch):
    """With AMX, vLLM counts a stage's layers in each configuration: as of one stage."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@bites("stock", "pr43617", "newest")
def test_omni_refuses_a_first_stage_of_too_few_layers(engine_config, no_amx, monkeypatch):
    """D13: its decoder has four, and DeepStack adds to the first three."""
    from vllm.distributed import get_pp_group

    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,2")
    monkeypatch.setattr(get_pp_group(), "world_size", 2)
    monkeypatch.setattr(get_pp_group(), "ranks", [0, 1])
    config = engine_config(OMNI)
    with pytest.raises(ValueError, match=r"layers 0 to 2, but the first .* has layers 0 to 1 only"):
        initialize(config)


def test_omni_takes_a_first_stage_of_just_enough(engine_config, no_amx, monkeypatch):
    from vllm.distributed import get_pp_group

    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    monkeypatch.setattr(get_pp_group(), "world_size", 2)
    monkeypatch.setattr(get_pp_group(), "ranks", [0, 1])
    assert made_by(initialize(engine_config(OMNI))) == EXPECTED


def moss_audio(config):
    from vllm.config import set_current_vllm_config

    module = import_module("vllm.model_executor.models.moss_audio")
    config.model_config.hf_config = module.MossAudioConfig(**MOSS_AUDIO)
    with set_current_vllm_config(config):
        return module.MossAudioModel(vllm_config=config)


@pytest.mark.release(">=0.24")
@bites("newest")
def test_moss_audio(engine_config):
    model = moss_audio(engine_config("qwen3_vl"))
    assert made_by(model) == EXPECTED[:2]
    assert len([key for key, _ in model.named_buffers() if "deepstack" in key]) == 2


@pytest.mark.release(">=0.33")  # before, its encoder cannot be made without weights
def test_moss_audio_without_a_tower(engine_config):
    model = moss_audio(engine_config("qwen3_vl", limit_mm_per_prompt={"audio": 0}))
    assert model._get_deepstack_input_embeds(5) is None


def granite_4_vision(config):
    from vllm.config import set_current_vllm_config

    transformers = import_module("transformers")
    module = import_module("vllm.model_executor.models.granite4_vision")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config.model_config.hf_config = transformers.Granite4VisionConfig(
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 2, **small}
        | {"image_size": 64, "patch_size": 16},
        text_config={"model_type": "granite4_vision_text", "num_hidden_layers": 4, **small}
        | {"num_key_value_heads": 2, "vocab_size": 512},
        qformer_config={"encoder_hidden_size": 64, **small},
        image_token_index=5,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 3],
    )
    with set_current_vllm_config(config):
        return module.Granite4VisionForConditionalGeneration(vllm_config=config)


@pytest.mark.release(">=0.30")  # before, it does not import beside today's Transformers
@bites("newest")
def test_granite_4_vision(engine_config):
    model = granite_4_vision(engine_config("qwen3_vl"))
    found = [buffer for key, buffer in model.named_buffers() if "deepstack" in key]
    assert [id(buffer) for buffer in found] == [id(buffer) for buffer in buffers_of(model)]
    assert [tuple(buffer.shape) for buffer in found] == [(TOKENS, 64)] * 4
    assert not any("deepstack" in key for key in model.state_dict())
    assert torch.stack(found).eq(0).all()


@pytest.mark.release(">=0.30")
@bites("0.32.0", "newest")
@pytest.mark.parametrize("make", [moss_audio, granite_4_vision])
def test_decoders_of_copies_are_shared_with_none_that_differs(make, engine_config):
    """D20. The fork's are none of the release's, either; 0.33.0 has the limits in its own key."""
    keys = []
    for options in ({}, {"enable_mm_embeds": True}):
        config = engine_config("qwen3_vl", **options)
        released = config.compute_hash()
        make(config)
        assert config.compute_hash() != released
        keys.append(config.additional_config["deepstack"])
    assert len(set(keys)) == 2
