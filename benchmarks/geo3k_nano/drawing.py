"""Draws a figure: of varied size, rotation, line width, font and label places."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .figures import Figure, Point, at

TILE = 32
"""Pixels of an image token's side in Qwen3-VL: whole tiles are drawn, so nothing resizes them."""
TILES = (5, 7)
MARGIN, LABELLED_MARGIN = 10, 26  # pixels; where sides have labels, those are outside
SCALE = 2  # drawn larger, then reduced: smooth lines
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")


@dataclass
class Drawing:
    image: Image.Image
    glyphs: list[tuple[str, float, float]] = field(default_factory=list)
    """The labels' characters, each with its centre: pixels from the left and from the top."""


@cache
def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """One of the fonts that come with matplotlib, so that all machines draw the same."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), pixels
    )


def draw(figure: Figure, rng: np.random.Generator, size: tuple[int, int] | None = None) -> Drawing:
    """An RGB image of `size` (width, height in pixels), or of 5 to 7 tiles a side.

    Drawn anew until all labels are inside and none is over another.
    """
    while True:
        if drawing := attempt(figure, rng, size):
            return drawing


def unit(vector: Point) -> Point:
    return vector / np.linalg.norm(vector)


def attempt(
    figure: Figure, rng: np.random.Generator, size: tuple[int, int] | None
) -> Drawing | None:
    tiles = rng.integers(TILES[0], TILES[1] + 1, 2)
    width, height = size or (int(tiles[0]) * TILE, int(tiles[1]) * TILE)
    rotation = rng.uniform(0, 360)
    turn = np.array([at(rotation), at(rotation + (90 if rng.integers(2) else -90))])
    points = [p for line in figure.lines for p in line]
    points += [c + at(d, r) for c, r in figure.circles for d in range(0, 360, 15)]
    turned = np.array(points) @ turn.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    margin = LABELLED_MARGIN if figure.sides else MARGIN
    scale = min((np.array([width, height]) - 2 * margin) / (high - low)) * rng.uniform(0.88, 1)

    def pixel(point: Point) -> Point:
        x, y = (turn @ point - (low + high) / 2) * scale
        return SCALE * np.array([width / 2 + x, height / 2 - y])

    paper = tuple(int(v) for v in rng.integers(235, 256, 3))
    ink = tuple(int(v) for v in rng.integers(0, 70, 3))
    stroke = int(rng.integers(1, 4)) * SCALE
    image = Image.new("RGB", (width * SCALE, height * SCALE), paper)
    pen = ImageDraw.Draw(image)
    for centre, radius in figure.circles:
        pen.circle(tuple(pixel(centre)), radius * scale * SCALE, outline=ink, width=stroke)
    for one, other in figure.lines:
        pen.line([*pixel(one), *pixel(other)], fill=ink, width=stroke)
    for one, other in figure.ticks:
        p, q = pixel(one), pixel(other)
        across = unit(q - p)[::-1] * (-6 * SCALE, 6 * SCALE)
        pen.line([*((p + q) / 2 - across), *((p + q) / 2 + across)], fill=ink, width=stroke)
    for vertex, one, other in figure.squares:
        v = pixel(vertex)
        u, w = (unit(pixel(p) - v) * 9 * SCALE for p in (one, other))
        pen.line([*(v + u), *(v + u + w), *(v + w)], fill=ink, width=SCALE)

    labels = []  # where from, in which direction, how far, what
    for vertex, one, other, text in figure.angles:
        v, p, q = pixel(vertex), pixel(one), pixel(other)
        start, end = (math.degrees(math.atan2(*(side - v)[::-1])) for side in (p, q))
        if (end - start) % 360 > 180:
            start, end = end, start
        corner = 12 * SCALE
        pen.arc([*(v - corner), *(v + corner)], start, end, fill=ink, width=SCALE)
        reach = 0.55 * min(math.dist(p, v), math.dist(q, v)) / SCALE
        distance = max(20.0, min(float(rng.uniform(22, 42)), reach))
        labels.append((v, unit(unit(p - v) + unit(q - v)), distance, text))
    for one, other, inside, text in figure.sides:
        p, q = pixel(one), pixel(other)
        normal = unit(q - p)[::-1] * (-1, 1)
        outwards = normal if normal @ (p - pixel(inside)) > 0 else -normal
        beside = p + (q - p) * rng.uniform(0.4, 0.6)
        labels.append((beside, outwards, float(rng.uniform(12, 17)), text))

    letters = font(str(rng.choice(FONTS)), int(rng.integers(15, 20)) * SCALE)
    boxes: list[tuple[float, ...]] = []
    drawing = Drawing(image)
    for origin, direction, distance, text in labels:
        where = tuple(origin + direction * distance * SCALE)
        box = pen.textbbox(where, text, font=letters, anchor="mm", stroke_width=2 * SCALE)
        if min(box[:2]) < 0 or box[2] > image.width or box[3] > image.height:
            return None
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            return None
        boxes.append(box)
        # A border of paper keeps lines off the digits.
        pen.text(
            where,
            text,
            fill=ink,
            font=letters,
            anchor="mm",
            stroke_width=2 * SCALE,
            stroke_fill=paper,
        )
        left = where[0] - letters.getlength(text) / 2
        for i, glyph in enumerate(text):
            middle = (letters.getlength(text[:i]) + letters.getlength(text[: i + 1])) / 2
            drawing.glyphs.append((glyph, (left + middle) / SCALE, where[1] / SCALE))
    drawing.image = image.reduce(SCALE)
    return drawing
