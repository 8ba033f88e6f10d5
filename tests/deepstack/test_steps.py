"""Whole steps, on vLLM's own model classes: what the decoder gets, whatever runs before it."""

from __future__ import annotations

import threading
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .bare_models import (
    ALL,
    HIDDEN,
    IMAGE,
    LEVELS,
    ROWS,
    SHARED,
    TEXT,
    bare,
    embed,
    embeddings_of,
    forward_reads,
    levels_of,
    make,
    medium,
    payload,
    read,
    run_forward,
    stack,
)

pytestmark = pytest.mark.usefixtures("one_process")
bites = pytest.mark.bites
everywhere = bites("stock", "pr43617", "newest")

# MOSS-Audio came with 0.24, without #43617's change: D1, and no payload to outlive its step.
AFFECTED_BY_D1 = [
    pytest.param(name, marks=bites("newest" if name == "moss_audio" else "stock"))
    if name != "granite4_vision"
    else name
    for name in ALL
]
AFFECTED_BY_D2 = [
    name if name == "moss_audio" else pytest.param(name, marks=everywhere) for name in ALL
]


def image_step(model, name: str, tokens: int, seed: int = 1) -> torch.Tensor:
    """Embeds a text token and a medium of `tokens - 1`; the levels `[levels, tokens, hidden]`."""
    embeddings = embeddings_of(name, tokens - 1, seed)
    embed(model, [TEXT, *[medium(name)] * (tokens - 1)], [embeddings])
    return torch.nn.functional.pad(levels_of(embeddings), (0, 0, 1, 0))


@pytest.mark.parametrize("name", AFFECTED_BY_D1)
def test_decoder_compiled_in_the_profiling_run_takes_levels_later(name):
    """D1, as vLLM compiles: once, on the profiling run's inputs, with all guards dropped. Then a
    step of 8 tokens, padded to 16, is the same compiled as eager."""
    torch._dynamo.reset()  # without guards, another model's graph would be taken
    eager, compiled = make(name, rows=16), make(name, rows=16)
    inside = compiled.language_model.model
    inside.forward = torch.compile(
        inside.forward,
        backend="eager",
        dynamic=True,
        fullgraph=True,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    run_forward(compiled, 16)
    run_forward(eager, 16)
    for model in (eager, compiled):
        levels = image_step(model, name, 8)
    outputs = [run_forward(model, 16) for model in (eager, compiled)]
    expected = torch.ones(16, HIDDEN)
    expected[:8] += levels.sum(0)
    torch.testing.assert_close(outputs[1], expected)
    torch.testing.assert_close(outputs[0], expected)


@pytest.mark.parametrize("name", AFFECTED_BY_D2)
def test_text_step_holds_no_rows_of_an_image_step_before_it(name):
    """D2: a full CUDA graph replays without the Python in `forward` that clears."""
    model = make(name)
    forward_reads(model, ROWS)
    image_step(model, name, 5)
    embed(model, [TEXT], [])
    assert forward_reads(model, ROWS).eq(0).all()


@pytest.mark.parametrize("name", AFFECTED_BY_D2)
def test_shorter_image_step_holds_no_rows_of_a_longer_one(name):
    model = make(name)
    image_step(model, name, 7)
    levels = image_step(model, name, 3, seed=2)
    seen = forward_reads(model, ROWS)
    assert seen[:, :3].equal(levels)
    assert seen[:, 3:].eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_forward_reads_what_is_staged_and_no_later_step_does(name):
    model = make(name)
    levels = image_step(model, name, 3)
    seen = forward_reads(model, 5)
    assert seen[:, :3].equal(levels) and seen[:, 3:].eq(0).all()
    embed(model, [TEXT], [])
    assert forward_reads(model, 5).eq(0).all()


@everywhere
@pytest.mark.parametrize("name", SHARED)
def test_whole_model_compiled(name):
    """`CompilationMode.STOCK_TORCH_COMPILE` traces `forward` with `fullgraph=True`, where plain
    attributes that change from step to step are guards."""
    model = make(name, rows=64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for step in range(60):
            tokens = 2 + (7 * step) % 41
            levels = torch.zeros(LEVELS, tokens, HIDDEN)
            if step % 2:
                levels = image_step(model, name, tokens, seed=step)
            else:
                embed(model, [TEXT] * tokens, [])
            inputs = torch.ones(tokens, HIDDEN)
            output = compiled(input_ids=None, positions=torch.zeros(tokens), inputs_embeds=inputs)
            torch.testing.assert_close(output, 1 + levels.sum(0))
    assert len(graphs) <= 8


@everywhere
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("first, second", [(3, 3), (2, 5), (ROWS, ROWS)])
def test_micro_batches_read_their_own_rows(name, monkeypatch, first, second):
    """D9: dual-batch overlap runs the second half while the first half has yet to read."""
    from vllm.v1.worker import ubatching

    model = make(name, rows=2 * ROWS)
    decoder = model.language_model.model

    def micro_batch(number: int, tokens: int) -> None:
        monkeypatch.setitem(ubatching._THREAD_ID_TO_CONTEXT, threading.get_ident(), number)
        run_forward(model, tokens)

    seen = {}

    def during_first(step):
        decoder.during = lambda step: seen.update(second=stack(step).clone())
        micro_batch(1, second)
        seen["first"] = stack(step).clone()

    staged = payload(first + second)
    for _ in range(2):  # the second time around, as another step
        model._set_deepstack_input_embeds(staged)
        decoder.during = during_first
        micro_batch(0, first)
        assert seen["first"].equal(staged[:, :first])
        assert seen["second"].equal(staged[:, first:])
        ubatching._THREAD_ID_TO_CONTEXT.clear()
        embed(model, [TEXT], [])
        assert read(model, first + second).eq(0).all()


def ernie(monkeypatch, attn_metadata) -> tuple[Any, list[Any]]:
    """Ernie 4.5-VL, and which tokens its decoder is told are visual, in each step."""
    experts = import_module("vllm.model_executor.models.ernie45_vl_moe")
    context = SimpleNamespace(attn_metadata=attn_metadata)
    monkeypatch.setattr(experts, "get_forward_context", lambda: context, raising=False)
    module, told = import_module("vllm.model_executor.models.ernie45_vl"), list[Any]()

    def decoder(visual_token_mask=None, **inputs):
        told.append(None if visual_token_mask is None else visual_token_mask.flatten().tolist())

    embedding = torch.nn.Embedding(16, HIDDEN)
    model = bare(
        module.Ernie4_5_VLMoeForConditionalGeneration,
        get_language_model=lambda: SimpleNamespace(embed_input_ids=embedding),
        language_model=SimpleNamespace(model=decoder),
        visual_token_mask=None,
        _visual_token_ids_tensor_cache=torch.tensor([IMAGE]),
    )
    return model, told


@everywhere
def test_ernies_mask_of_visual_tokens_is_its_steps_own(monkeypatch):
    """D2: where a full CUDA graph replays, `forward`'s Python does not take it back. D17: a later
    pipeline stage embeds nothing."""
    model, told = ernie(monkeypatch, attn_metadata={})
    ids = torch.tensor([TEXT, IMAGE])
    mask = ids == IMAGE
    embeds = model.embed_input_ids(ids, [torch.ones(1, HIDDEN)], is_multimodal=mask)
    # Replayed. Then Python: a text, of as many tokens and of fewer, and a later stage.
    model.embed_input_ids(ids[:1], [], is_multimodal=mask[:1])
    model.forward(torch.tensor([TEXT, TEXT]), None, inputs_embeds=embeds)
    model.forward(ids[:1], None, inputs_embeds=embeds[:1])
    model.forward(ids, None, inputs_embeds=None)
    model.forward(None, None, inputs_embeds=embeds)  # `prompt_embeds`, in an engine of text alone
    assert told == [None, None, [False, True], None]


@everywhere
def test_ernies_graphs_have_both_kinds_of_experts(monkeypatch):
    """D17: what is recorded while nothing is visual is replayed where something is."""
    model, told = ernie(monkeypatch, attn_metadata=None)  # as a dummy run
    ids = torch.tensor([TEXT, TEXT])
    model.forward(ids, None, inputs_embeds=torch.ones(2, HIDDEN))
    assert told == [[False, False]]
    experts = import_module("vllm.model_executor.models.ernie45_vl_moe")
    layer = bare(
        experts.Ernie4_5_VLMoeMoE,
        hidden_size=HIDDEN,
        text_experts_gate=lambda states: (states, None),
        vision_experts_gate=lambda states: (states, None),
        text_experts=lambda hidden_states, router_logits: 2 * hidden_states,
        vision_experts=lambda hidden_states, router_logits: 3 * hidden_states,
    )
    mask, states = torch.tensor([[False], [False]]), torch.ones(2, HIDDEN)
    record = torch.fx.experimental.proxy_tensor.make_fx
    chosen = record(lambda states, mask: layer.forward(states, mask))(states, mask)
    mask = torch.tensor([[False], [True]])
    assert chosen(states, mask).tolist() == [[2.0] * HIDDEN, [3.0] * HIDDEN]


def sequence_lengths_of_omnis_vision_encoder(backend: str) -> torch.Tensor:
    """Its `cu_seqlens`, of two images of four patches. The encoder is on the meta device."""
    module = import_module("vllm.model_executor.models.qwen3_omni_moe_thinker")
    encoder = bare(module.Qwen3Omni_VisionTransformer)
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
