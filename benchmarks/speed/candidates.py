"""Ways to write some rows of a buffer, and to clear them: what the mixin's choice rests on.

PyTorch's own, on elements of 2 bytes and on words of 16; an image's rows are a slice.

    python -m benchmarks.speed.candidates

Exit code: 0, or 2 if the benchmark could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine

from . import SpeedError, results
from .deepstack import floor
from .staging import DTYPE, Staging, lay_out

LEVELS = 3
WORD = torch.complex128

Way = Callable[[torch.Tensor, list[torch.Tensor], list[torch.Tensor]], Any]


def slices(rows: list[torch.Tensor]) -> list[slice]:
    return [slice(int(part[0]), int(part[-1]) + 1) for part in rows]


def write_ways(rows: list[torch.Tensor]) -> dict[str, Way]:
    """Each takes buffers `[levels, rows, hidden]`, images alike, and the images' rows."""
    at = slices(rows)
    return {
        "copy_ to slices": lambda b, images, _: [b[:, s].copy_(i) for s, i in zip(at, images)],
        "index_copy_": lambda b, images, r: [b.index_copy_(1, n, i) for n, i in zip(r, images)],
        "b[:, rows] = …": lambda b, images, r: [
            b.__setitem__((slice(None), n), i) for n, i in zip(r, images)
        ],
    }


def clear_ways(rows: list[torch.Tensor]) -> dict[str, Way]:
    at, every = slices(rows), torch.cat(rows).cuda()
    return {
        "zero_ of slices": lambda b, *_: [b[:, s].zero_() for s in at],
        "index_fill_": lambda b, *_: b.index_fill_(1, every, 0),
    }


def measure(tokens: int, hidden: int, share: float, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by what is done and how."""
    lengths, mask = lay_out(tokens, share, 1024)
    rows = list(mask.nonzero().flatten().split(lengths))
    on_gpu = [part.cuda() for part in rows]
    buffers = torch.zeros(LEVELS, tokens, hidden, device="cuda", dtype=DTYPE)
    encoded = torch.randn(sum(lengths), (1 + LEVELS) * hidden, device="cuda").to(DTYPE)
    images = [
        image.view(-1, 1 + LEVELS, hidden)[:, 1:].transpose(0, 1)
        for image in encoded.split(lengths)
    ]
    found: dict[str, dict[str, float]] = {}
    for what, ways in (("write", write_ways(rows)), ("clear", clear_ways(rows))):
        for (name, way), dtype in product(ways.items(), (DTYPE, WORD)):
            b, parts = buffers.view(dtype), [image.view(dtype) for image in images]
            call = lambda way=way, b=b, parts=parts: way(b, parts, on_gpu)  # noqa: E731
            (seconds,) = Staging().timed([call], repeats)
            kind = "words" if dtype == WORD else "elements"
            found.setdefault(what, {})[f"{name}, {kind}"] = seconds
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.candidates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], metavar="N")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[2048], metavar="N")
    parser.add_argument("--image-shares", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--repeats", type=int, default=31, metavar="N")
    results.add_output(parser)
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if not torch.cuda.is_available():
            raise SpeedError("this benchmark times a GPU's kernels, and there is no GPU")
        results.claim(args.output_dir)
    except SpeedError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    bandwidth = Staging().device()["copy_bytes_per_second"]
    measured = []
    sizes = list(product(args.hidden_sizes, args.tokens, args.image_shares))
    with results.progress(console) as progress:
        for hidden, tokens, share in progress.track(sizes, description="measuring"):
            least = floor(round(tokens * share), hidden, LEVELS)
            size: dict[str, Any] = {"hidden": hidden, "tokens": tokens, "share": share}
            size["floor_seconds"] = {
                "write": least["split and stage"] / bandwidth,
                "clear": least["clear"] / bandwidth,
            }
            measured.append(size | measure(tokens, hidden, share, args.repeats))
    result = {"benchmark": "candidates", "sizes": measured, "machine": machine()}
    results.write(result, args.output_dir / "candidates.json")
    table = Table("hidden, tokens, share", "", "", box=None)
    table.add_column("µs", justify="right")
    table.add_column("× floor", justify="right")
    for size in measured:
        for what in ("write", "clear"):
            for way, seconds in size[what].items():
                name = f"{size['hidden']}, {size['tokens']}, {size['share']:.0%}"
                times = f"{seconds / size['floor_seconds'][what]:.2f}"
                table.add_row(name, what, way, f"{1e6 * seconds:.1f}", times)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
