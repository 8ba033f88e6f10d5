"""Draws the share of wrong texts against requests in flight, from one or more results.

python -m benchmarks.exposure.plot OUT.png RESULTS.json…
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(entries: list[dict[str, Any]], title: str, path: Path) -> None:
    """A line for each mode and vLLM: solid on a GPU, dashed in replay."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for entry in entries:
        line = lines.setdefault((entry["mode"], entry["vllm"]), {})
        line[entry["in_flight"]] = entry["wrong_texts"] / entry["texts"]
    modes = list(dict.fromkeys(mode for mode, _ in lines))
    vllms = list(dict.fromkeys(vllm for _, vllm in lines))
    for (mode, vllm), line in lines.items():
        counts = sorted(line)
        axes.plot(
            counts,
            [100 * line[n] for n in counts],
            linestyle="--" if mode.startswith("replay") else "-",
            color=f"C{modes.index(mode)}",
            marker="osx^"[vllms.index(vllm) % 4],
            label=f"{vllm}, {mode}",
        )
    counts = sorted({entry["in_flight"] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_ylim(-3, 103)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("wrong texts, %")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exposure.plot", description=__doc__)
    parser.add_argument("out", type=Path, help="a .png or .svg")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--model", default="geo3k_nano")
    parser.add_argument("--share", type=float, default=0.5, help="of requests that have an image")
    parser.add_argument("--side", type=int, default=0, help="of images, in pixels; 0: small ones")
    parser.add_argument("--arrivals", default="poisson")
    args = parser.parse_args()
    every = [entry for file in args.results for entry in json.loads(file.read_text())["entries"]]
    names = ("model", "share", "side", "arrivals")
    chosen = [e for e in every if "error" not in e and all(e[n] == vars(args)[n] for n in names)]
    images = f"images of up to {args.side} px" if args.side else "small images"
    draw(chosen, f"{args.model}: {args.share:.0%} {images}, {args.arrivals}", args.out)


if __name__ == "__main__":
    main()
