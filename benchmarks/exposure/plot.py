"""Draws the share of wrong texts against requests in flight, from one or more results.

python -m benchmarks.exposure.plot OUT.png RESULTS.json…
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .traffic import Cell


def main() -> None:
    """A line for each mode and vLLM: solid on a GPU, dashed in replay."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exposure.plot", description=__doc__)
    parser.add_argument("out", type=Path, help="a .png or .svg")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--model", default="geo3k_nano")
    parser.add_argument("--share", type=float, default=0.5, help="of requests that have an image")
    parser.add_argument("--side", type=int, default=0, help="of images, in pixels; 0: small ones")
    parser.add_argument("--arrivals", default="poisson")
    parser.add_argument("--system", type=int, default=0, help="tokens of the system prompt")
    args = parser.parse_args()
    parameters = ("model", "share", "side", "arrivals", "system")
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for entry in (e for file in args.results for e in json.loads(file.read_text())["entries"]):
        wanted = all(entry[n] == vars(args)[n] for n in parameters)
        if wanted and entry.get("texts"):
            line = lines.setdefault((entry["mode"], entry["vllm"]), {})
            line[entry["in_flight"]] = 100 * entry["wrong_texts"] / entry["texts"]
    if not lines:
        parser.error("there are no such results")
    modes, vllms = (list(dict.fromkeys(names)) for names in zip(*lines))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (mode, vllm), line in lines.items():
        style = "--" if mode.startswith("replay") else "-"
        look = f"C{modes.index(mode)}{'osx^'[vllms.index(vllm) % 4]}{style}"
        axes.plot(*zip(*sorted(line.items())), look, label=f"{vllm}, {mode}")
    counts = sorted({count for line in lines.values() for count in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("wrong texts, %")
    cell = Cell(args.arrivals, 0, args.share, args.side)
    axes.set_title(f"{args.model}: {cell}", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
