"""Whole steps, on vLLM's own model classes: what the decoder gets, whatever runs before it."""

from __future__ import annotations

import threading
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from .bare_models import CLASSES, LEVELS, ROWS, load, make, payload, read, run_forward, stack

bites = pytest.mark.bites
everywhere = bites("stock", "pr43617")


@pytest.fixture(params=CLASSES)
def model(request, one_process):
    return make(load(request.param))


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """vLLM's parallel groups, of this process alone: `forward` asks them for its stage."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    init = f"file://{tmp_path_factory.mktemp('group') / 'init'}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, init, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@everywhere
@pytest.mark.parametrize("staged, cleared", [(1, 0), (6, 0), (6, 2), (ROWS + 3, 0)])
def test_payload_that_forward_did_not_clear_is_gone_at_the_next_step(model, staged, cleared):
    """D2: a full CUDA graph replays without the Python in `forward` that clears."""
    model._set_deepstack_input_embeds(payload(staged))
    model._clear_deepstack_input_embeds(cleared)
    ids = torch.tensor([3])
    assert model.embed_input_ids(ids).equal(model.language_model.embed_input_ids(ids))
    assert read(model, max(staged, ROWS)).eq(0).all()


@bites("stock")
def test_forward_reads_what_is_staged_and_clears_it(model):
    seen = []
    model.language_model.decoder.during = lambda step: seen.append(stack(step).clone())
    run_forward(model, 5)
    model._set_deepstack_input_embeds(payload(3))
    run_forward(model, 5)
    run_forward(model, 5)
    profiled, step, later = seen
    assert profiled.eq(0).all() and later.eq(0).all()
    assert step[:, :3].equal(payload(3)) and step[:, 3:].eq(0).all()


@everywhere
@pytest.mark.parametrize("staged", [0, 3])
def test_buffers_take_the_dtype_of_the_decoders_inputs(model, staged):
    """D7. A payload that is staged already goes with them."""
    seen = []
    model.language_model.decoder.during = lambda step: seen.append(stack(step).clone())
    if staged:
        model._set_deepstack_input_embeds(payload(staged))
    run_forward(model, 5, dtype=torch.bfloat16)
    model._set_deepstack_input_embeds(payload(5))
    run_forward(model, 5, dtype=torch.bfloat16)
    assert seen[0].dtype == seen[1].dtype == torch.bfloat16
    if staged:
        assert seen[0][:, :staged].equal(payload(staged).bfloat16())
    assert seen[1].equal(payload(5).bfloat16())


def test_buffers_stay_where_they_are_once_they_are_where_the_decoder_is(model):
    run_forward(model, 5)
    before = [buffer.data_ptr() for buffer in model.deepstack_input_embeds]
    model._set_deepstack_input_embeds(payload(5))
    run_forward(model, 5)
    run_forward(model, 2)
    assert [buffer.data_ptr() for buffer in model.deepstack_input_embeds] == before


@everywhere
@pytest.mark.parametrize("first, second", [(3, 3), (2, 5), (ROWS, ROWS)])
def test_micro_batches_read_their_own_rows(model, monkeypatch, first, second):
    """D9: dual-batch overlap runs the second half while the first half has yet to read."""
    from vllm.v1.worker import ubatching

    def micro_batch(number: int, tokens: int) -> None:
        monkeypatch.setitem(ubatching._THREAD_ID_TO_CONTEXT, threading.get_ident(), number)
        run_forward(model, tokens)

    seen = {}

    def during_first(step):
        model.language_model.decoder.during = lambda step: seen.update(second=stack(step).clone())
        micro_batch(1, second)
        seen["first"] = stack(step).clone()

    staged = payload(first + second)
    model._set_deepstack_input_embeds(staged)
    model.language_model.decoder.during = during_first
    micro_batch(0, first)
    assert seen["first"].equal(staged[:, :first])
    assert seen["second"].equal(staged[:, first:])

    ubatching._THREAD_ID_TO_CONTEXT.clear()
    model.embed_input_ids(torch.tensor([3]))
    assert read(model, first + second).eq(0).all()


def sequence_lengths_of_omnis_vision_encoder(backend: str) -> torch.Tensor:
    """Its `cu_seqlens`, of two images of four patches. The encoder is on the meta device."""
    module = import_module("vllm.model_executor.models.qwen3_omni_moe_thinker")
    encoder = module.Qwen3Omni_VisionTransformer.__new__(module.Qwen3Omni_VisionTransformer)
    torch.nn.Module.__init__(encoder)
    seen = {}

    def block(hidden_states, **kwargs):
        seen.update(kwargs)
        return hidden_states

    weight = torch.empty(1, device="meta")
    encoder.patch_embed = torch.nn.Identity()
    encoder.patch_embed.proj = SimpleNamespace(weight=weight)
    encoder.apply_vit_abs_pos_embed = False
    encoder.rot_pos_emb = lambda grid_thw: (weight, weight)
    encoder.attn_backend = module.AttentionBackendEnum[backend]
    encoder.deepstack_visual_indexes = None
    encoder.blocks = [block]
    encoder.merger = torch.nn.Identity()
    encoder.forward(torch.ones(8, LEVELS), torch.tensor([[1, 2, 2], [1, 2, 2]]))
    assert seen["cu_seqlens"].shape == (3,)
    return seen["cu_seqlens"]


@pytest.mark.release(">=0.22,<0.24")
@bites("stock", "pr43617")
def test_omni_vision_encoder_has_sequence_lengths_on_its_own_device():
    """D8: FlashAttention 3 refuses those on the CPU."""
    assert sequence_lengths_of_omnis_vision_encoder("FLASH_ATTN").device.type == "meta"


@pytest.mark.release(">=0.22,<0.24")
def test_omni_vision_encoder_does_not_wait_for_sequence_lengths():
    """SDPA splits by them: each layer would fetch them from the GPU."""
    assert sequence_lengths_of_omnis_vision_encoder("TORCH_SDPA").tolist() == [0, 4, 8]


@pytest.mark.release("<0.30")
@pytest.mark.parametrize(
    "module, name, decoder",
    [
        ("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3ForCausalLM"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "Qwen3MoeForCausalLM"),
    ],
)
@pytest.mark.parametrize("own", [pytest.param(None, marks=everywhere), ["OwnForCausalLM"]])
def test_decoder_has_an_architecture(module, name, decoder, own):
    """D11: pipeline parallelism looks the decoder's class up by it."""
    text_config = SimpleNamespace(architectures=own)
    config = SimpleNamespace(hf_config=SimpleNamespace(text_config=text_config))
    cls = getattr(import_module(f"vllm.model_executor.models.{module}"), name)
    with pytest.raises(AttributeError, match="quant_config"):  # the next that upstream asks for
        cls.__init__(cls.__new__(cls), vllm_config=SimpleNamespace(model_config=config))
    assert text_config.architectures == (own or [decoder])
