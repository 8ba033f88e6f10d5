"""Geo3K-nano's questions, each from a seed and a number, and which split they belong to."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL.Image import Image

from .drawing import draw
from .figures import FAMILIES, Figure

SPLITS = ("train", "validation", "test")
QUESTIONS = ("Find x.", "What is the value of x?", "Solve for x.", "Determine x.")


def split_of(figure: Figure) -> str:
    key = f"{figure.family} {figure.numbers}".encode()
    return {0: "test", 1: "validation"}.get(hashlib.sha256(key).digest()[0] % 10, "train")


def figure_of(split: str, rng: np.random.Generator) -> Figure:
    """A figure that belongs to the split; all families are as likely."""
    family = FAMILIES[int(rng.integers(len(FAMILIES)))]
    while split_of(figure := family(rng)) != split:
        pass
    return figure


def question(split: str, seed: int, index: int) -> tuple[Figure, Image, str]:
    """The figure, the drawing and the problem that a seed and a number give."""
    rng = np.random.default_rng((SPLITS.index(split), seed, index))
    figure = figure_of(split, rng)
    return figure, draw(figure, rng).image, f"<image>{QUESTIONS[int(rng.integers(len(QUESTIONS)))]}"
