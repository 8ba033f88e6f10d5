"""The DeepStack path alone: what happens to image tokens' features around the decoder, a step.

Against the floor: each image token's features read once and written once, each stale row
cleared once, at the bandwidth of a large copy on the same GPU. All vLLMs take turns at every
size; inputs are fresh and caches cold.

    python -m benchmarks.speed.deepstack --vllm pr43617=TREE fork

Exit code: 0, or 2 if the benchmark could not run.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from vllm_deepstack import cli
from vllm_deepstack.cli import UserError

from . import plots, results
from .workers import Variant, workers

ITEMSIZE = 2
"""Bytes of a bfloat16."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.deepstack",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    results.add_variants(parser)
    add(
        "--tokens",
        type=cli.positive,
        nargs="+",
        default=[256, 1024, 4096, 8192, 16384],
        metavar="N",
    )
    add("--hidden-sizes", type=cli.positive, nargs="+", default=[2048, 4096], metavar="N")
    add("--image-shares", type=float, nargs="+", default=[0.1, 0.5, 1.0], metavar="SHARE")
    add("--levels", type=cli.positive, default=3)
    add("--image-tokens", type=cli.positive, default=1024, metavar="N", help="at most, an image")
    add("--repeats", type=cli.positive, default=31, metavar="N", help="of which the median counts")
    results.add_output(parser)
    args = parser.parse_args(arguments)
    if any(not 0 < share <= 1 for share in args.image_shares):
        parser.error("--image-shares must be over 0 and at most 1")
    return args


def floor(staged: int, hidden: int, levels: int) -> dict[str, int]:
    """Bytes that a step with `staged` image tokens has to move."""
    features = staged * hidden * levels * ITEMSIZE
    return {"split and stage": 2 * features, "read": 0, "clear": features}


def benchmark(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise UserError("this benchmark times a GPU's kernels, and there is no GPU")
    results.claim(args.output_dir)
    named = [Variant.parse(text) for text in args.vllm]
    sizes = list(product(args.hidden_sizes, args.tokens, args.image_shares))
    measured = []
    with (
        workers(named, "benchmarks.speed.staging", args.logs) as every,
        results.progress(console) as progress,
    ):
        for worker in every:
            worker.start()
        told = {worker.variant.name: worker.ask("device") for worker in every}
        bandwidth = max(one["copy_bytes_per_second"] for one in told.values())
        task = progress.add_task("measuring", total=len(sizes) * len(every))
        for seed, (hidden, tokens, share) in enumerate(sizes):
            size: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "share": share}
            staged = max(1, round(tokens * share))
            least = floor(staged, hidden, args.levels)
            plain = every[0].ask("plain", nbytes=least["clear"], repeats=args.repeats)
            paths = {}
            for worker in every:
                progress.update(task, description=f"{worker.variant.name}: {size}")
                paths[worker.variant.name] = worker.ask(
                    "path",
                    **size,
                    levels=args.levels,
                    image_tokens=args.image_tokens,
                    repeats=args.repeats,
                    seed=seed,
                )
                progress.advance(task)
            measured.append(
                size
                | {
                    "staged": staged,
                    "images": -(-staged // args.image_tokens),
                    "floor_bytes": sum(least.values()),
                    "floor_seconds": sum(least.values()) / bandwidth,
                    "plain_seconds": plain,
                    "paths": paths,
                }
            )
        for worker in every:
            worker.stop()
    return {
        "benchmark": "deepstack",
        "dtype": "bfloat16",
        "levels": args.levels,
        "vllm": told,
        "copy_bytes_per_second": bandwidth,
        "sizes": measured,
        "machine": machine(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    console.print(
        f"a step's DeepStack path on {results.device(result)}, {result['levels']} levels, "
        f"{result['dtype']}; copying: {result['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("hidden", "tokens", "images", "share", "floor µs", "copy_, zero_ µs"):
        table.add_column(heading, justify="right")
    for name in result["vllm"]:
        table.add_column(f"{name} µs", justify="right")
        table.add_column("kernels µs", justify="right")
        table.add_column("× floor", justify="right")
        table.add_column("bytes × floor", justify="right")
        table.add_column("host µs", justify="right")
    for size in result["sizes"]:
        least = size["floor_seconds"]
        cells = []
        for path in size["paths"].values():
            moved = sum(part["bytes"] for part in path["moved"].values())
            cells += [
                f"{1e6 * path['seconds']:.1f}",
                f"{1e6 * path['busy_seconds']:.1f}",
                f"{path['seconds'] / least:.2f}",
                f"{moved / size['floor_bytes']:.2f}",
                f"{1e6 * path['host_seconds']:.0f}",
            ]
        table.add_row(
            str(size["hidden"]),
            str(size["tokens"]),
            str(size["images"]),
            f"{size['share']:.0%}",
            f"{1e6 * least:.1f}",
            f"{1e6 * size['plain_seconds']:.1f}",
            *cells,
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return cli.run(lambda: execute(args))


def execute(args: argparse.Namespace) -> int:
    result = benchmark(args, Console(stderr=True))
    cli.write_json(result, args.output_dir / "deepstack.json")
    plots.deepstack(result, args.output_dir / "deepstack.png")
    show(result, Console(width=cli.width()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
