"""The buffers' contract, on vLLM's own model classes.

`test_releases.py` runs this folder on broken variants of vLLM: tests marked `bites` fail there.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .bare_models import CLASSES, HIDDEN, LEVELS, ROWS, load, make, payload, read, stack

bites = pytest.mark.bites
everywhere = bites("stock", "pr43617")


@pytest.fixture(params=CLASSES)
def cls(request):
    return load(request.param)


@bites("stock")
def test_nothing_staged_reads_as_zeros(cls):
    """D1: the profiling run has to see the inputs that later steps have."""
    assert read(make(cls), 5).eq(0).all()


@bites("stock")
def test_inputs_are_the_same_before_and_after_a_payload(cls):
    model = make(cls)
    before = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(5)
    after = model._get_deepstack_input_embeds(5)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before.tensors)


@bites("0.20.1")
def test_payload_reads_back_and_padding_is_zeros(cls):
    """D10: a step is padded beyond the rows that were staged."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, 5).equal(payload(5))
    assert read(model, 7)[:, :5].equal(payload(5))
    assert read(model, 7)[:, 5:].eq(0).all()


@bites("stock")
def test_payload_is_gone_once_cleared(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    model._clear_deepstack_input_embeds(6)
    assert read(model, ROWS).eq(0).all()


@bites("stock")
def test_reading_is_a_view_that_shows_what_is_staged_later(cls):
    """A captured graph reads the storage that it was captured with."""
    model = make(cls)
    tensors = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    assert stack(tensors).equal(payload(5))


@everywhere
def test_what_was_read_before_growing_shows_what_is_staged_after(cls):
    """D5: a captured graph goes on reading the storage that it was captured with."""
    model = make(cls)
    captured = model._get_deepstack_input_embeds(5)
    for rows in (ROWS + 1, 5 * ROWS, 3 * ROWS):
        model._set_deepstack_input_embeds(payload(rows, seed=rows))
        assert stack(captured).equal(payload(rows, seed=rows)[:, :5])
    model._set_deepstack_input_embeds(payload(2))
    assert stack(captured)[:, :2].equal(payload(2))
    assert stack(captured)[:, 2:].eq(0).all()
    model._clear_deepstack_input_embeds(2)
    assert stack(captured).eq(0).all()


@bites("pr43617")
def test_small_steps_go_on_reading_what_a_graph_has_captured(cls):
    """D5: or the graph's copy would show another payload than the next step's."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    captured = model._get_deepstack_input_embeds(5)
    model._get_deepstack_input_embeds(ROWS + 1)
    again = model._get_deepstack_input_embeds(5)
    assert stack(again).equal(payload(5))
    for key, tensor in captured.tensors.items():
        assert again[key].data_ptr() == tensor.data_ptr()


def test_longer_payload_grows_the_buffers(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(ROWS + 3))
    assert read(model, ROWS + 3).equal(payload(ROWS + 3))


@everywhere
def test_reading_beyond_the_rows_keeps_the_payload(cls):
    """D4: a padded step may have more tokens than the buffers have rows."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(5))
    assert read(model, ROWS + 3)[:, :5].equal(payload(5))
    assert read(model, ROWS + 3)[:, 5:].eq(0).all()


@everywhere
def test_shorter_payload_leaves_nothing_of_a_longer_one(cls):
    """D6."""
    model = make(cls)
    model._set_deepstack_input_embeds(payload(6, seed=1))
    model._set_deepstack_input_embeds(payload(2, seed=2))
    assert read(model, ROWS)[:, :2].equal(payload(2, seed=2))
    assert read(model, ROWS)[:, 2:].eq(0).all()


@everywhere
def test_clearing_some_rows_leaves_the_others_staged(cls):
    model = make(cls)
    model._set_deepstack_input_embeds(payload(6))
    model._clear_deepstack_input_embeds(2)
    assert read(model, 6)[:, :2].eq(0).all()
    assert read(model, 6)[:, 2:].equal(payload(6)[:, 2:])
    model._clear_deepstack_input_embeds(6)
    assert read(model, 6).eq(0).all()


def test_payload_takes_the_buffers_dtype(cls):
    model = make(cls, dtype=torch.bfloat16)
    model._set_deepstack_input_embeds(payload(3))
    assert read(model, 3).equal(payload(3).bfloat16())


@everywhere
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


@pytest.mark.parametrize("buffers", [None, "empty", pytest.param("meta", marks=bites("pr43617"))])
def test_no_vision_tower(cls, buffers):
    """D3: no buffers, no levels, or buffers of a tower that vLLM does not load."""
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


@everywhere
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
