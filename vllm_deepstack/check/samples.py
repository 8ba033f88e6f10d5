"""The prompts that both engines are given."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, UnidentifiedImageError

from ..cli import UserError
from . import FORMAT

QUESTIONS = (
    "What is the length of x?",
    "Which angle is the largest?",
    "Find the area of the shape.",
)


@dataclass
class Sample:
    """A chat or a raw prompt, with its images in the order in which they occur."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    images: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The prompt of a sample for a model that has no chat template."""
        return self.prompt if self.prompt is not None else (self.messages or [])[-1]["content"]


def builtin(count: int, folder: Path) -> list[Sample]:
    """`count` samples, with drawings written to `folder`: of five, four have images (one
    of them two) and one is text only, the noise floor."""
    samples = []
    for i in range(count):
        images = []
        for k in range((1, 1, 2, 1, 0)[i % 5]):
            path = folder / f"{i}-{k}.png"
            drawing(3 * i + k).save(path)
            images.append(str(path))
        samples.append(Sample([{"role": "user", "content": QUESTIONS[i % 3]}], images=images))
    return samples


def drawing(seed: int) -> Image.Image:
    """A labelled triangle and a circle, no two sizes or places alike."""
    width, height = 160 + 32 * (seed % 4), 160 + 32 * (seed % 3)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    apex = (30 + 17 * seed % (width - 60), 15 + 5 * seed % 40)
    draw.polygon(
        [(15, height - 20), (width - 15, height - 30 - 7 * seed % 50), apex],
        outline="black",
        width=3,
    )
    draw.ellipse(
        [apex[0] - 9, height // 2, apex[0] + 30, height // 2 + 39], fill=(40 * seed % 256, 90, 160)
    )
    draw.text((width // 2, height - 18), f"x = {seed}", fill="red")
    return image


def load(file: Path, count: int | None) -> list[Sample]:
    """The samples of a JSON lines file, or the first `count`.

    Raises:
        UserError: the file or an image is missing, or a line is not a sample.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            samples.append(_sample(line, f"{file}:{number}", file.parent))
    if not samples:
        raise UserError(f"{file}: no samples in it; {FORMAT}")
    return samples[:count]


def _sample(line: str, where: str, folder: Path) -> Sample:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}; {FORMAT}") from None
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise UserError(f"{where}: {FORMAT}")
    unknown = entry.keys() - {"prompt", "messages", "images"}
    if unknown:
        raise UserError(f"{where}: unknown field {sorted(unknown)[0]!r}; {FORMAT}")
    images = [str(folder / path) for path in entry.get("images", [])]
    for path in images:
        try:
            with Image.open(path) as image:
                image.verify()
        except FileNotFoundError:
            raise UserError(f"{where}: {path} does not exist") from None
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{where}: {path} is not an image: {error}") from None
    sample = Sample(entry.get("messages"), entry.get("prompt"), images)
    if sample.messages is not None:
        with_images(sample, lambda path: path)  # its marks and images agree in number
    return sample


def with_images(sample: Sample, part: Any) -> list[dict[str, Any]]:
    """The sample's messages with `part(path)` in place of each `{"type": "image"}`.

    Where there is no such mark, the images come first in the first user message.

    Raises:
        UserError: as many marks as images there are not.
    """
    messages = [dict(message) for message in sample.messages or []]
    parts = [c for m in messages if isinstance(m.get("content"), list) for c in m["content"]]
    marks = sum(c.get("type") == "image" for c in parts)
    if marks != len(sample.images):
        user = next((m for m in messages if m.get("role") == "user"), None)
        if marks or user is None:
            raise UserError(f"{marks} image marks in the messages, {len(sample.images)} images")
        text = user["content"]
        user["content"] = [{"type": "image"}] * len(sample.images) + (
            [{"type": "text", "text": text}] if isinstance(text, str) else text
        )
    images = iter(sample.images)
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [
                part(next(images)) if c.get("type") == "image" else c for c in message["content"]
            ]
    return messages
