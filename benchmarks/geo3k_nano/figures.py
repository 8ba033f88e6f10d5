"""Geo3K-nano's questions as geometry: points, marks, and the whole number that is asked for.

All numbers that a solver needs are marks of the figure; the question has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Point = NDArray[np.float64]
LARGEST_SIDE = 100
TRIPLES = [
    (a, b, math.isqrt(a * a + b * b))
    for a in range(3, LARGEST_SIDE)
    for b in range(a + 1, LARGEST_SIDE)
    if math.isqrt(a * a + b * b) ** 2 == a * a + b * b < LARGEST_SIDE**2
]


@dataclass
class Figure:
    """A figure before it is drawn: coordinates of any scale, the y axis upwards."""

    family: str
    numbers: tuple[int, ...]
    """With the family, what the question is about: what is given, what is asked."""
    answer: int
    reasoning: str
    lines: list[tuple[Point, Point]] = field(default_factory=list)
    circles: list[tuple[Point, float]] = field(default_factory=list)
    angles: list[tuple[Point, Point, Point, str]] = field(default_factory=list)
    """Vertex, a point on each side, and the label: degrees, or `x`."""
    sides: list[tuple[Point, Point, Point, str]] = field(default_factory=list)
    """Both ends, a point on the label's other side, and the label: a length, or `x`."""
    ticks: list[tuple[Point, Point]] = field(default_factory=list)
    """Sides marked as equal."""
    squares: list[tuple[Point, Point, Point]] = field(default_factory=list)
    """Right angles: vertex and a point on each side."""


def at(degrees: float, radius: float = 1.0) -> Point:
    return radius * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def triangle(a: float, b: float) -> list[Point]:
    """Corners A, B, C with angles `a` at A and `b` at B, in degrees; AB is of length 1."""
    side = math.sin(math.radians(b)) / math.sin(math.radians(a + b))
    return [np.zeros(2), np.array([1.0, 0.0]), at(a, side)]


def outline(corners: list[Point]) -> list[tuple[Point, Point]]:
    return list(zip(corners, corners[1:] + corners[:1]))


def corner_angles(corners: list[Point], labels: list[str]) -> list[tuple[Point, Point, Point, str]]:
    return [(corners[i], corners[i - 1], corners[i - 2], labels[i]) for i in range(3) if labels[i]]


def missing_angle(rng: np.random.Generator) -> Figure:
    while True:
        a, b = (int(x) for x in rng.integers(25, 111, 2))
        if 25 <= 180 - a - b <= 110:
            break
    low, high = sorted((a, b))
    answer = 180 - a - b
    reasoning = f"Triangle: {low}+{high}={low + high}, 180-{low + high}={answer}."
    corners = triangle(a, b)
    return Figure(
        "triangle",
        (low, high),
        answer,
        reasoning,
        lines=outline(corners),
        angles=corner_angles(corners, [f"{a}°", f"{b}°", "x"]),
    )


def isosceles(rng: np.random.Generator) -> Figure:
    base = int(rng.integers(30, 76))
    apex = 180 - 2 * base
    corners = triangle(base, base)
    figure = Figure("isosceles", (base, apex), apex, "", lines=outline(corners))
    if rng.integers(2):
        figure.reasoning = f"Isosceles: 2*{base}={2 * base}, 180-{2 * base}={apex}."
        labels = [f"{base}°", "", "x"]
    else:
        figure.numbers, figure.answer = (apex, base), base
        figure.reasoning = f"Isosceles: 180-{apex}={2 * base}, {2 * base}/2={base}."
        labels = ["x", "", f"{apex}°"]
    figure.angles = corner_angles(corners, labels)
    figure.ticks = [(corners[0], corners[2]), (corners[1], corners[2])]
    return figure


def parallels(rng: np.random.Generator) -> Figure:
    """Two parallel lines and a transversal: corresponding, alternate or same-side angles."""
    a = int(rng.integers(35, 146))
    kind = int(rng.integers(3))
    answer = 180 - a if kind == 2 else a
    reasoning = (f"Corresponding: {a}.", f"Alternate: {a}.", f"Same side: 180-{a}={answer}.")[kind]
    low, high = np.zeros(2), at(a, 1 / math.sin(math.radians(a)))
    right, along = np.array([1.0, 0.0]), at(a)
    one, other = [(right, along), (-right, -along), (right, -along)][kind]
    return Figure(
        "parallels",
        (kind, a),
        answer,
        reasoning,
        lines=[(point - right, point + right) for point in (low, high)]
        + [(low - 0.5 * along, high + 0.5 * along)],
        angles=[
            (low, low + right, low + along, f"{a}°"),
            (high, high + one, high + other, "x"),
        ],
    )


def inscribed(rng: np.random.Generator) -> Figure:
    """An inscribed and a central angle over the same chord."""
    half = int(rng.integers(25, 81))
    centre, apex = np.zeros(2), at(90 + float(rng.uniform(-30, 30)))
    p, q = at(-90 - half), at(-90 + half)
    figure = Figure(
        "chords",
        (half, 2 * half),
        2 * half,
        f"Central: 2*{half}={2 * half}.",
        circles=[(centre, 1.0)],
        lines=[(apex, p), (apex, q), (centre, p), (centre, q)],
    )
    labels = [f"{half}°", "x"]
    if rng.integers(2):
        figure.numbers, figure.answer = (2 * half, half), half
        figure.reasoning = f"Inscribed: {2 * half}/2={half}."
        labels = ["x", f"{2 * half}°"]
    figure.angles = [(apex, p, q, labels[0]), (centre, p, q, labels[1])]
    return figure


def tangent(rng: np.random.Generator) -> Figure:
    """A tangent, the radius to its point of contact, and a line from its end to the centre."""
    a = int(rng.integers(25, 66))  # at the centre
    centre, contact = np.zeros(2), at(-90)
    outside = contact + np.array([math.tan(math.radians(a)), 0.0])
    figure = Figure(
        "tangent",
        (1, 90 - a),
        a,
        f"Tangent: 90-{90 - a}={a}.",
        circles=[(centre, 1.0)],
        lines=[
            (contact - 0.5 * (outside - contact), outside),
            (centre, contact),
            (centre, outside),
        ],
        squares=[(contact, centre, outside)],
    )
    labels = ["x", f"{90 - a}°"]
    if rng.integers(2):
        figure.numbers, figure.answer = (0, a), 90 - a
        figure.reasoning = f"Tangent: 90-{a}={90 - a}."
        labels = [f"{a}°", "x"]
    figure.angles = [
        (centre, contact, outside, labels[0]),
        (outside, contact, centre, labels[1]),
    ]
    return figure


def right_triangle(rng: np.random.Generator) -> Figure:
    a, b, c = TRIPLES[int(rng.integers(len(TRIPLES)))]
    asked = int(rng.integers(3))
    reasoning = (
        f"Right triangle: {c}^2-{b}^2={a}^2.",
        f"Right triangle: {c}^2-{a}^2={b}^2.",
        f"Right triangle: {a}^2+{b}^2={c}^2.",
    )[asked]
    corners = [np.zeros(2), np.array([float(b), 0.0]), np.array([0.0, float(a)])]
    ends = ((0, 2, 1), (0, 1, 2), (1, 2, 0))
    return Figure(
        "right triangle",
        (a, b, c, asked),
        (a, b, c)[asked],
        reasoning,
        lines=outline(corners),
        squares=[(corners[0], corners[1], corners[2])],
        sides=[
            (corners[p], corners[q], corners[inside], "x" if i == asked else str((a, b, c)[i]))
            for i, (p, q, inside) in enumerate(ends)
        ],
    )


FAMILIES: tuple[Callable[[np.random.Generator], Figure], ...] = (
    missing_angle,
    isosceles,
    parallels,
    inscribed,
    tangent,
    right_triangle,
)
