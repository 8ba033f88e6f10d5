"""The buffers' contract, on vLLM's own model classes.

`test_bites.py` runs this file on the stock release: tests marked `bites` fail there.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

LEVELS, ROWS, HIDDEN = 3, 8, 4
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
bites = pytest.mark.bites


class Config:
    """The one part of a model's config that the stock release's methods look at."""

    class text_config:
        hidden_size = HIDDEN


def make(cls, rows=ROWS, **kind):
    """A model with buffers and without weights, as its `__init__` leaves them."""
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    model.config = Config
    model.deepstack_num_level = LEVELS
    model.deepstack_input_embeds = [torch.zeros(rows, HIDDEN, **kind) for _ in range(LEVELS)]
    model.deepstack_input_embeds_num_tokens = 0
    return model


def load(module: str) -> type:
    """Imported late: whoever only collects the tests is spared vLLM's import."""
    return getattr(import_module(f"vllm.model_executor.models.{module}"), CLASSES[module])


@pytest.fixture(params=CLASSES)
def cls(request):
    return load(request.param)


def payload(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LEVELS, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def read(model, tokens: int) -> torch.Tensor:
    """`[levels, tokens, hidden]`, as the decoder gets it."""
    tensors = model._get_deepstack_input_embeds(tokens)
    assert type(tensors).__name__ == "IntermediateTensors"
    assert list(tensors.tensors) == [f"deepstack_input_embeds_{level}" for level in range(LEVELS)]
    assert all(tensor.shape == (tokens, HIDDEN) for tensor in tensors.tensors.values())
    return torch.stack(list(tensors.tensors.values()))


@bites
def test_nothing_staged_reads_as_zeros(cls):
    """D1: the profiling run has to see the inputs that later steps have."""
    assert read(make(cls), 5).eq(0).all()


@bites
def test_inputs_are_the_same_before_and_after_a_payload(cls):
    model = make(cls)
    before = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(5)
    after = model._get_deepstack_input_embeds(5)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before.tensors)


def test_payload_reads_back_and_padding_is_zeros(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, 5).equal(payload(5))
    assert read(model, 7)[:, :5].equal(payload(5))
    assert read(model, 7)[:, 5:].eq(0).all()


@bites
def test_payload_is_gone_once_cleared(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(6)
    assert read(model, ROWS).eq(0).all()


@bites
def test_reading_is_a_view_that_shows_what_is_staged_later(cls):
    """A captured graph reads the storage that it was captured with."""
    model = make(cls)
    tensors = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    assert torch.stack(list(tensors.tensors.values())).equal(payload(5))


def test_longer_payload_grows_the_buffers(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(ROWS + 3))
    assert read(model, ROWS + 3).equal(payload(ROWS + 3))


@bites
def test_reading_beyond_the_rows_keeps_the_payload(cls):
    """D4: a padded step may have more tokens than the buffers have rows."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, ROWS + 3)[:, :5].equal(payload(5))
    assert read(model, ROWS + 3)[:, 5:].eq(0).all()


@bites
def test_shorter_payload_leaves_nothing_of_a_longer_one(cls):
    """D6."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(6, seed=1))
    model._set_deepstack_input_embeds(payload(2, seed=2))
    assert read(model, ROWS)[:, :2].equal(payload(2, seed=2))
    assert read(model, ROWS)[:, 2:].eq(0).all()


@bites
def test_clearing_some_rows_leaves_the_others_staged(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(6))
    model._clear_deepstack_input_embeds(2)
    assert read(model, 6)[:, :2].eq(0).all()
    assert read(model, 6)[:, 2:].equal(payload(6)[:, 2:])
    model._clear_deepstack_input_embeds(6)
    assert read(model, 6).eq(0).all()


@bites
@pytest.mark.parametrize("staged, cleared", [(1, 0), (6, 0), (6, 2), (ROWS + 3, 0)])
def test_payload_that_forward_did_not_clear_is_gone_at_the_next_step(cls, staged, cleared):
    """D2: a full CUDA graph replays without the Python in `forward` that clears."""
    model = make(cls)
    embeddings = torch.nn.Embedding(16, HIDDEN)
    model.language_model = SimpleNamespace(embed_input_ids=embeddings)
    model._set_deepstack_input_embeds(payload(staged))
    model._clear_deepstack_input_embeds(cleared)
    ids = torch.tensor([3])
    assert model.embed_input_ids(ids).equal(embeddings(ids))
    assert read(model, 2 * ROWS).eq(0).all()


def test_payload_takes_the_buffers_dtype(cls):
    model = make(cls, dtype=torch.bfloat16)
    model._set_deepstack_input_embeds(payload(3))
    assert read(model, 3).equal(payload(3).bfloat16())


@bites
@pytest.mark.parametrize(
    "shape", [(LEVELS - 1, 3, HIDDEN), (LEVELS, 3, 1), (LEVELS + 1, 3, HIDDEN)]
)
def test_payload_of_another_shape_is_an_error(cls, shape):
    """PyTorch would spread hidden size 1 over all of a row, and the model would drop a level."""
    model = make(cls)
    with pytest.raises(
        ValueError, match=f"{shape[0]} levels, hidden size {shape[2]}, .*{LEVELS} levels"
    ):
        model._set_deepstack_input_embeds(torch.ones(shape))
    assert read(model, ROWS).eq(0).all()


@pytest.mark.parametrize("buffers", [None, "empty", "meta"])
def test_no_vision_tower(cls, buffers):
    """No buffers, no levels, or buffers of a tower that vLLM does not load."""
    model = make(cls, device="meta" if buffers == "meta" else None)
    if buffers is None:
        del model.deepstack_input_embeds, model.deepstack_input_embeds_num_tokens
    elif buffers == "empty":
        model.deepstack_input_embeds = []
    assert model._get_deepstack_input_embeds(5) is None
    if buffers != "meta":
        model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(5)
    assert model._get_deepstack_input_embeds(5) is None


steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(1, 2 * ROWS)),
        st.tuples(st.just("clear"), st.integers(0, 2 * ROWS)),
        st.tuples(st.just("get"), st.integers(1, 2 * ROWS)),
    ),
    max_size=12,
)


@bites
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(CLASSES)), steps)
def test_any_order_of_calls(module, steps):
    """A row holds the payload last staged there, or zeros: against a model of plain rows."""
    model, expected = make(load(module)), torch.zeros(LEVELS, 4 * ROWS, HIDDEN)
    for seed, (call, tokens) in enumerate(steps):
        if call == "set":
            model._set_deepstack_input_embeds(payload(tokens, seed))
            expected.zero_()[:, :tokens] = payload(tokens, seed)
        elif call == "clear":
            model._clear_deepstack_input_embeds(tokens)
            expected[:, :tokens] = 0
        else:
            assert read(model, tokens).equal(expected[:, :tokens])
    assert read(model, 3 * ROWS).equal(expected[:, : 3 * ROWS])
