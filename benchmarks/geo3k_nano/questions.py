"""Geo3K-nano's questions, each from a split, a seed and a number."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL.Image import Image

from .drawing import draw
from .figures import FAMILIES, Figure

SPLITS = ("train", "validation", "test")
QUESTIONS = ("Find x.", "What is the value of x?", "Solve for x.", "Determine x.")


def held_out(figure: Figure) -> bool:
    """Whether no figure of the train split has these numbers: so for a fifth of all numbers."""
    key = f"{figure.family} {figure.numbers}".encode()
    return hashlib.sha256(key).digest()[0] % 10 < 2


def figure_of(split: str, rng: np.random.Generator) -> Figure:
    """A figure for the split; all families are as likely."""
    family = FAMILIES[int(rng.integers(len(FAMILIES)))]
    while not allowed(split, figure := family(rng)):
        pass
    return figure


def allowed(split: str, figure: Figure) -> bool:
    """Train has the numbers that are not held out, validation those that are, test has all."""
    return split == "test" or held_out(figure) == (split == "validation")


def question(split: str, seed: int, index: int) -> tuple[Figure, Image, str]:
    """The figure, the drawing and the problem that a seed and a number give."""
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    figure = figure_of(split, rng)
    return figure, draw(figure, rng).image, f"<image>{QUESTIONS[int(rng.integers(len(QUESTIONS)))]}"
