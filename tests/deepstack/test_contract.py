"""The buffers' contract, on vLLM's own model classes: the four methods, and what vLLM's tools
do with the buffers.

`test_releases.py` runs this folder on broken variants of vLLM: tests marked `bites` fail there.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import examples

from .bare_models import (
    ALL,
    HIDDEN,
    LEVELS,
    OMNI,
    ROWS,
    SHARED,
    buffers_of,
    encoded,
    load,
    make,
    payload,
    read,
)

bites = pytest.mark.bites
everywhere = bites("stock", "pr43617", "newest")
OLD = ["qwen3_vl", OMNI]


@pytest.fixture(params=SHARED)
def name(request):
    return request.param


@bites("stock")
def test_nothing_staged_reads_as_zeros(name):
    """D1: the profiling run has to see the inputs that later steps have."""
    assert read(make(name), 5).eq(0).all()


@bites("stock")
def test_inputs_are_the_same_before_and_after_a_payload(name):
    model = make(name)
    before = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(5)
    after = model._get_deepstack_input_embeds(5)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before.tensors)


@bites("0.20.1")
def test_payload_reads_back_and_padding_is_zeros(name):
    """D10: a step is padded beyond the rows that were staged."""
    model = make(name)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, 5).equal(payload(5))
    assert read(model, 7)[:, :5].equal(payload(5))
    assert read(model, 7)[:, 5:].eq(0).all()


@bites("stock")
def test_payload_is_gone_once_cleared(name):
    model = make(name)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(6)
    assert read(model, ROWS).eq(0).all()


@everywhere
def test_shorter_payload_leaves_nothing_of_a_longer_one(name):
    """D6."""
    model = make(name)
    model._set_deepstack_input_embeds(payload(6, seed=1))
    model._set_deepstack_input_embeds(payload(2, seed=2))
    assert read(model, ROWS)[:, :2].equal(payload(2, seed=2))
    assert read(model, ROWS)[:, 2:].eq(0).all()


@everywhere
def test_clearing_some_rows_leaves_the_others_staged(name):
    model = make(name)
    model._set_deepstack_input_embeds(payload(6))
    model._clear_deepstack_input_embeds(2)
    assert read(model, 6)[:, :2].eq(0).all()
    assert read(model, 6)[:, 2:].equal(payload(6)[:, 2:])
    model._clear_deepstack_input_embeds(6)
    assert read(model, 6).eq(0).all()


def test_payload_takes_the_buffers_dtype(name):
    model = make(name, dtype=torch.bfloat16)
    model._set_deepstack_input_embeds(payload(3))
    assert read(model, 3).equal(payload(3).bfloat16())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(1, ROWS)),
        st.tuples(st.just("clear"), st.integers(0, 2 * ROWS)),
        st.tuples(st.just("get"), st.integers(1, ROWS)),
    ),
    max_size=12,
)


@pytest.mark.thinned
@everywhere
@settings(max_examples=examples(200), deadline=None)
@given(st.sampled_from(SHARED), steps)
def test_any_order_of_calls(name, steps):
    """A row holds the payload last staged there, or zeros: against a model of plain rows."""
    model, expected = make(name), torch.zeros(LEVELS, ROWS, HIDDEN)
    for seed, (call, tokens) in enumerate(steps):
        if call == "set":
            model._set_deepstack_input_embeds(payload(tokens, seed))
            expected.zero_()[:, :tokens] = payload(tokens, seed)
        elif call == "clear":
            model._clear_deepstack_input_embeds(tokens)
            expected[:, :tokens] = 0
        else:
            assert read(model, tokens).equal(expected[:, :tokens])
    assert read(model, ROWS).equal(expected)


def test_attributes_have_upstreams_types(name):
    """Plugins replace methods by such that begin as upstream's: `if not getattr(self, …)`."""
    model = make(name)
    for call in (lambda: None, lambda: model._set_deepstack_input_embeds(payload(5))):
        call()
        buffers = getattr(model, "deepstack_input_embeds", None)
        assert isinstance(buffers, list) and bool(buffers)
        assert [tuple(buffer.shape) for buffer in buffers] == [(ROWS, HIDDEN)] * LEVELS
        assert isinstance(model.deepstack_input_embeds_num_tokens, int)


def test_a_plugin_that_replaces_methods(name, monkeypatch):
    """As vllm-ascend's do: they index the list, and make a new one to grow."""

    def get(self, num_tokens):
        if not getattr(self, "deepstack_input_embeds", None):
            return None
        return [self.deepstack_input_embeds[i][:num_tokens] for i in range(LEVELS)]

    def clear(self, num_tokens):
        if not getattr(self, "deepstack_input_embeds", None):
            return
        for level in range(LEVELS):
            self.deepstack_input_embeds[level][:num_tokens].zero_()

    cls = load(name)
    monkeypatch.setattr(cls, "_get_deepstack_input_embeds", get)
    monkeypatch.setattr(cls, "_clear_deepstack_input_embeds", clear)
    model = make(name)
    model.deepstack_input_embeds = [torch.zeros(2 * ROWS, HIDDEN) for _ in range(LEVELS)]
    model._set_deepstack_input_embeds(payload(ROWS + 2))
    assert torch.stack(model._get_deepstack_input_embeds(ROWS + 2)).equal(payload(ROWS + 2))
    model._clear_deepstack_input_embeds(ROWS + 2)
    assert torch.stack(model._get_deepstack_input_embeds(2 * ROWS)).eq(0).all()


def registered(model) -> list[torch.Tensor]:
    return [buffer for _, buffer in model.named_buffers()]


REGISTERED = ALL


@everywhere
@pytest.mark.parametrize("name", REGISTERED)
def test_buffers_are_registered(name):
    """D7: `sleep(level=2)` saves and restores, in place, what `named_buffers()` lists."""
    model = make(name)
    assert len(registered(model)) == LEVELS
    assert not any(key.startswith("deepstack") for key in model.state_dict())


@pytest.mark.parametrize("name", ALL)
def test_weights_are_reloaded_around_the_buffers(name, monkeypatch):
    """vLLM's `reload_weights`: a graph has captured the buffers' addresses. It does not warn of
    buffers that no checkpoint has."""
    reload = import_module("vllm.model_executor.model_loader.reload")
    warnings = []
    logger = import_module(f"{reload.__name__}.layerwise").logger
    monkeypatch.setattr(logger, "warning", lambda *args: warnings.append(args))
    model = make(name)
    if name == "granite4_vision":
        model.image_newline = torch.nn.Parameter(torch.ones(HIDDEN), requires_grad=False)
    for level, buffer in enumerate(buffers_of(model)):
        buffer.fill_(level + 1)
    addresses = [buffer.data_ptr() for buffer in buffers_of(model)]
    reload.record_metadata_for_reloading(model)
    reload.initialize_layerwise_reload(model)
    if name == "granite4_vision":
        loader = model.image_newline.weight_loader
        loader(model.image_newline, torch.full((HIDDEN,), 2.0))
    reload.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
    assert type(model).__name__ not in str(warnings)
    assert [buffer.data_ptr() for buffer in buffers_of(model)] == addresses
    for level, buffer in enumerate(buffers_of(model)):
        assert buffer.eq(level + 1).all()


@pytest.mark.release(">=0.31")
@pytest.mark.parametrize("name", ALL)
def test_weight_cache_shares_no_staging(name):
    """vLLM's weight cache maps what `named_buffers()` lists into other engines."""
    loader = import_module("vllm.model_executor.model_loader.weight_cache.ipc_loader")
    daemon, engine = make(name), make(name)
    entries = {
        key: SimpleNamespace(kind="buffer", rebuild=lambda index, tensor=tensor: tensor)
        for key, tensor in daemon.named_buffers(remove_duplicate=False)
    }
    state = SimpleNamespace(entries=entries, aliases={})
    loader.IpcModelLoader._apply_entries(SimpleNamespace(mode="zero_copy"), engine, state, 0)
    for buffer in buffers_of(engine):
        buffer.fill_(1)
    assert all(buffer.eq(0).all() for buffer in buffers_of(daemon))


def without_tower(model, enable_mm_embeds: bool):
    utils = import_module("vllm.model_executor.models.utils")
    model.visual = utils.StageMissingLayer("vision_tower", torch.nn.Identity())
    model.multimodal_config.enable_mm_embeds = enable_mm_embeds
    return model


def test_no_buffers_read_as_none(name):
    """No vision tower, or no levels."""
    model = make(name)
    model._deepstack_buffers = []
    assert model._get_deepstack_input_embeds(5) is None
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(5)
    assert model._get_deepstack_input_embeds(5) is None


def test_text_only_engines_make_no_buffers(name):
    """D3: `__init__`s ask `use_deepstack` first; on the meta device they would be no inputs."""
    model = without_tower(make(name), enable_mm_embeds=False)
    model.use_deepstack = True  # as up to 0.27.1, which do not look at the tower
    assert model.use_deepstack is False


@pytest.mark.release(">=0.30")
@pytest.mark.parametrize("from_encoders", [False, True])
def test_kv_consumers_of_text_alone_make_no_buffers(name, from_encoders):
    """vLLM gives them `enable_mm_embeds` unasked. Those that encoders send embeddings to have them
    for a reason."""
    config = import_module("vllm.config")
    model = without_tower(make(name), enable_mm_embeds=True)
    model.multimodal_config.language_model_only = True
    model.multimodal_config.allow_missing_mm_embeddings = True
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    own = {"kv_transfer_config": config.KVTransferConfig(**transfer)}
    if from_encoders:
        transfer = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
        own["ec_transfer_config"] = config.ECTransferConfig(**transfer)
    with config.set_current_vllm_config(config.VllmConfig(**own)):
        model.use_deepstack = True
    assert model.use_deepstack is from_encoders


def test_engines_that_are_sent_embeddings_stage_their_levels(name):
    """D15: without a tower; vLLM makes the buffers in its context, or says there are none."""
    model = without_tower(make(name), enable_mm_embeds=True)
    model.use_deepstack = False  # as from 0.28 on
    assert model.use_deepstack is True
    with torch.device("meta"):
        model.deepstack_input_embeds = [torch.zeros(ROWS, HIDDEN) for _ in range(LEVELS)]
    assert not any(buffer.is_meta for buffer in model.deepstack_input_embeds)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, 5).equal(payload(5))


def test_levels_are_dropped_where_there_are_no_buffers():
    """InternS1-Pro inherits Qwen3-VL's class, and makes none: as released. `status` names it."""
    from .bare_models import IMAGE, TEXT, embed

    model = make("qwen3_vl")
    model._deepstack_buffers = []
    inputs = embed(model, [TEXT, IMAGE, IMAGE, TEXT], [encoded(2, 1)])
    assert inputs[1:3].equal(encoded(2, 1)[:, :HIDDEN])
    assert model._get_deepstack_input_embeds(4) is None
