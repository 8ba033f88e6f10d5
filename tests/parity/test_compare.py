"""The check's arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_deepstack.check.compare import TOLERANCE, Run, compare, kl_divergences, tolerance


def kl_largest(a, b):
    return max(kl_divergences(a, b))


def run(tokens, logits) -> Run:
    return Run(np.array(tokens), np.array(logits, np.float32))


def test_equal_runs():
    a = run([1, 0], [[0, 1, 0], [2, 0, 0]])
    d = compare(a, a)
    assert (d.first, d.decode, d.kl, d.agreed, d.steps, d.largest) == (0, 0, 0, 2, 2, 0)


def test_first_token_and_decoding_are_told_apart():
    d = compare(run([1, 0], [[0, 1, 0], [2, 0, 0]]), run([1, 0], [[0, 1.25, 0], [2, 0, -0.5]]))
    assert (d.first, d.decode, d.agreed, d.largest) == (0.25, 0.5, 2, 0.5)


def test_steps_after_the_first_different_token_do_not_count():
    """The step at which the tokens differ does: both engines saw the same context there."""
    a = run([1, 0, 2], [[0, 1, 0], [2, 1.5, 0], [0, 0, 9]])
    b = run([1, 1, 0], [[0, 1, 0], [2, 2.25, 0], [9, 0, 0]])
    d = compare(a, b)
    assert (d.first, d.decode, d.agreed, d.steps) == (0, 0.75, 1, 3)


def test_no_decoding_to_compare():
    d = compare(run([0, 0], [[1, 0], [0, 0]]), run([1, 0], [[0, 1], [9, 0]]))
    assert (d.first, d.decode, d.agreed, d.largest) == (1, None, 0, 1)


def test_masked_tokens_agree_and_nan_never_does():
    masked = run([1], [[-np.inf, 1, 0]])
    assert compare(masked, masked).largest == 0
    assert compare(masked, run([1], [[0, 1, 0]])).largest == math.inf
    broken = run([1], [[np.nan, 1, 0]])
    assert compare(broken, broken).largest == math.inf


@pytest.mark.parametrize("other", [run([0], [[1.0, 0, 0]]), run([0, 0], [[1.0, 0], [1, 0]])])
def test_runs_of_other_shapes_are_an_error(other):
    with pytest.raises(ValueError, match="shapes"):
        compare(run([0], [[1.0, 0]]), other)


def test_kl_divergence_by_hand():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_largest(np.log(p) + 7, np.log(q) - 3) == pytest.approx(by_hand)
    assert kl_largest(np.log(q), np.log(q)) == 0


finite = arrays(np.float64, (2, 5), elements=st.floats(-50, 50))


@given(finite, finite)
def test_kl_divergence_is_never_negative(a, b):
    assert kl_largest(a, b) >= 0


def test_tolerance_grows_with_the_logits():
    small, large = run([0], [[9.0, -3.0]]), run([1], [[-40.0, 1.0]])
    assert tolerance("bfloat16", [small]) == TOLERANCE["bfloat16"]
    assert tolerance("bfloat16", [small, large]) == 4 * TOLERANCE["bfloat16"]
    assert tolerance("float32", [run([0], [[-math.inf, math.nan]])]) == TOLERANCE["float32"]
