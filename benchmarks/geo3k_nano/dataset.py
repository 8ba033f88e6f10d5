"""Writes Geo3K-nano, in Geo3K's schema, as a folder of parquet files.

The splits share no figure: each draws its own. A fifth of all numbers (of angles, of sides),
chosen by hash, is held out: train has none of them, validation no others, test has all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as pictures
from tqdm import tqdm

from .questions import question

SIZES = {"train": 20_000, "validation": 500, "test": 600}
FEATURES = Features(
    {"images": List(Image()), "problem": Value("string"), "answer": Value("string")}
)


def examples(split: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    for index in tqdm(range(count), desc=split):
        figure, image, problem = question(split, seed, index)
        yield {"images": [image], "problem": problem, "answer": str(figure.answer)}


def sheet(split: str, seed: int, columns: int = 6, rows: int = 2) -> pictures.Image:
    """The split's first figures side by side."""
    side = 236
    whole = pictures.new("RGB", (columns * side, rows * side), "white")
    for index in range(columns * rows):
        _, image, _ = question(split, seed, index)
        left, top = index % columns * side, index // columns * side
        whole.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    return whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geo3k_nano.dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    for split, size in SIZES.items():
        parser.add_argument(
            f"--{split}",
            type=int,
            default=size,
            metavar="N",
            help=f"questions (default: {size}; 0: do not write this split)",
        )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="a picture of some test figures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        if count := getattr(args, split):
            data = Dataset.from_list(list(examples(split, args.seed, count)), features=FEATURES)
            part = args.out / f".{split}.parquet"
            data.to_parquet(part)
            part.rename(args.out / f"{split}-00000-of-00001.parquet")
    if args.sheet:
        sheet("test", args.seed).save(args.sheet)


if __name__ == "__main__":
    main()
