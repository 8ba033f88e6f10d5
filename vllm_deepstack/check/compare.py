"""The arithmetic of the check: how far two runs of one sample are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Largest |Δlogit| that counts as agreement. Measured on tiny models whose logits have a
# scale of 3: in float32 compiled and eager differ by some 3e-6, in bfloat16 by 0.02 to
# 0.05; without DeepStack's features they differ by 1.8 and more.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
MASKED = 1e4
"""A logit that is larger, up or down, is no measure: a token was masked (-inf, `finfo.min`)."""
TOP = 20
"""The logits of a step, from the largest, whose scale counts."""


@dataclass(frozen=True)
class Run:
    """What one engine gave for one sample."""

    tokens: NDArray[np.int64]
    """`[steps]`: the greedy tokens."""
    logits: NDArray[np.float32]
    """`[steps, vocabulary]`: the logits they were taken from."""


@dataclass(frozen=True)
class Difference:
    first: float
    """Largest |Δlogit| at the first token."""
    decode: float | None
    """Largest |Δlogit| of the later steps, up to the first at which the tokens differ; None
    where there is none: one token only, or the first one differs."""
    kl: float
    """Largest Kullback-Leibler divergence of a step, KL(ours ‖ theirs), in nats."""
    agreed: int
    """Tokens in agreement before the first that differs."""
    steps: int
    by_step: list[float]
    """Largest |Δlogit| of each step that was compared."""
    chosen: list[float]
    """Of each of these steps, |Δ log-probability| of the token that ours chose."""
    kls: list[float]
    """Of each, KL(ours ‖ theirs), in nats."""

    @property
    def largest(self) -> float:
        return max(self.first, self.decode or 0.0)


def compare(ours: Run, theirs: Run) -> Difference:
    """Compares step by step while the contexts are the same.

    Raises:
        ValueError: the runs differ in steps or vocabulary, or have no steps.
    """
    if ours.logits.shape != theirs.logits.shape or not len(ours.tokens):
        raise ValueError(f"logits of shapes {ours.logits.shape} and {theirs.logits.shape}")
    steps = len(ours.tokens)
    differ = np.flatnonzero(ours.tokens != theirs.tokens)
    agreed = int(differ[0]) if len(differ) else steps
    compared = min(agreed + 1, steps)
    a, b = (run.logits[:compared].astype(np.float64) for run in (ours, theirs))
    with np.errstate(invalid="ignore"):
        same = (a == b) | ((a < -MASKED) & (b < -MASKED))  # both mask a token
        delta = np.where(same, 0.0, np.abs(a - b)).max(axis=1)
    delta = np.where(np.isnan(delta), np.inf, delta)
    decode = float(delta[1:].max()) if compared > 1 else None
    by_step = [float(step) for step in delta]
    kls = kl_divergences(a, b)
    rows = np.arange(compared), ours.tokens[:compared]
    with np.errstate(invalid="ignore"):
        chosen = np.abs(log_softmax(a)[rows] - log_softmax(b)[rows]).tolist()
    return Difference(by_step[0], decode, max(kls), agreed, steps, by_step, chosen, kls)


def tolerance(dtype: str, runs: Iterable[Run], least: float = 10.0) -> float:
    """The dtype's for logits of up to 10; for larger ones as much more as its steps are wider. The
    scale is that of the largest logits of each step, from which tokens are chosen. `least`: of
    embeddings, which may all be small, 0."""
    scale = least
    for run in runs:
        for step in run.logits:
            known = step[np.isfinite(step) & (np.abs(step) < MASKED)]
            scale = max(scale, float(np.abs(np.sort(known)[-TOP:]).max(initial=0)))
    return TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) * scale / 10


def kl_divergences(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[float]:
    """KL(softmax a ‖ softmax b) of each row, in nats; inf where it is undefined."""
    p, q = log_softmax(a), log_softmax(b)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    return [math.inf if math.isnan(row) else max(row, 0.0) for row in terms.sum(axis=1).tolist()]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
