"""Loads Geo3K, or a data set of its schema."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from vllm_deepstack.cli import UserError

from . import INSTRUCTION, UnreachableError

GEO3K = "hiyouga/geometry3k"
COLUMNS = ("images", "problem", "answer")
IMAGES = datasets.List(datasets.Image())
MARK = "<image>"


@dataclass(frozen=True)
class Question:
    number: int
    problem: str
    images: list[Image.Image]
    answer: str

    def content(self, paths: list[str]) -> list[dict[str, Any]]:
        """The user's message in parts; `paths` are the images' files."""
        left = iter(paths)
        parts: list[dict[str, Any]] = []
        for i, text in enumerate(self.problem.split(MARK)):
            if i:
                parts.append({"type": "image", "path": next(left)})
            if text:
                parts.append({"type": "text", "text": text})
        return [*parts, {"type": "text", "text": f" {INSTRUCTION}"}]


def load(dataset: str, split: str, count: int | None = None) -> list[Question]:
    """A split, or its first `count` questions.

    `dataset` is a folder of parquet files, or a name on the hub, with the columns `images`,
    `problem` (an `<image>` for each) and `answer`.

    Raises:
        UserError: no such data set or split, other columns, an image that cannot be read.
    """
    local = dataset.startswith((".", "/", "~")) or Path(dataset).exists()
    path = str(Path(dataset).expanduser()) if local else dataset
    if local and not list(Path(path).rglob("*.parquet")):
        raise UserError(f"--dataset {dataset}: it has no parquet files")
    try:
        # Without progress bars of its own: a small split takes less time than they do.
        datasets.disable_progress_bars()
        builder = datasets.load_dataset_builder(path)
        splits = [str(name) for name in builder.info.splits or builder.config.data_files]
        if split not in splits:
            raise UserError(f"--split {split}: {dataset} has {', '.join(sorted(splits))}")
        data = datasets.load_dataset(path, split=split)
        kind = data.features.get("images")
        if kind == IMAGES:
            data = data.cast_column("images", datasets.List(datasets.Image(decode=False)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        advice = "" if local else "; without a network, give --dataset a folder of parquet files"
        kind = UnreachableError if isinstance(error, ConnectionError) else UserError
        raise kind(f"--dataset {dataset} cannot be loaded: {error}{advice}") from None
    finally:
        datasets.enable_progress_bars()
    if missing := [name for name in COLUMNS if name not in data.column_names]:
        raise UserError(
            f"--dataset {dataset}: the column {missing[0]!r} is missing from its {split} split, "
            f"which has {', '.join(data.column_names)}; Geo3K has {', '.join(COLUMNS)}"
        )
    if kind != IMAGES:
        raise UserError(
            f"--dataset {dataset}: the column 'images' holds {kind}, not lists of images"
        )
    if count is not None:
        data = data.select(range(min(count, len(data))))
    where = f"{dataset}, {split} split"
    return [question(number, row, f"{where}, question {number}") for number, row in enumerate(data)]


def question(number: int, row: dict[str, Any], where: str) -> Question:
    images = []
    for image in row["images"]:
        try:
            source = BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
            with Image.open(source) as opened:
                images.append(opened.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise UserError(f"{where}: an image cannot be read: {error}") from None
    marks = row["problem"].count(MARK)
    if marks != len(images):
        raise UserError(f"{where}: {marks} {MARK} marks, {len(images)} images")
    return Question(number, row["problem"], images, row["answer"])
