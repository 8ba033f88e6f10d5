"""The results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from .results import device

matplotlib.use("Agg")
from matplotlib import pyplot


def serving(result: dict[str, Any], path: Path) -> None:
    """Each workload's time as a multiple of the first vLLM's, with quartiles."""
    names = list(result["vllm"])
    workloads = list(dict.fromkeys(row["workload"] for row in result["rows"]))
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(workloads) + 1.4), layout="constrained")
    for i, name in enumerate(names):
        rows = {row["workload"]: row for row in result["rows"] if row["vllm"] == name}
        ratios = [rows[workload]["ratio"] for workload in workloads]
        medians = [ratio["median"] for ratio in ratios]
        below = [ratio["median"] - ratio["low"] for ratio in ratios]
        above = [ratio["high"] - ratio["median"] for ratio in ratios]
        places = [j + 0.18 * (i - (len(names) - 1) / 2) for j in range(len(workloads))]
        axes.errorbar(medians, places, xerr=[below, above], fmt="o", markersize=4, label=name)
        for median, place in zip(medians, places):
            if median > 1.5:
                axes.annotate(f" {median:.1f}", (median, place), fontsize=7, va="center")
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.9, 1, 1.1, 1.5, 2, 3, 5, 10, 20) if tick < axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time, as a multiple of {names[0]}'s (median of rounds, quartiles)")
    axes.set_title(f"{result['model']}, {result['dtype']}, {device(result)}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def deepstack(result: dict[str, Any], path: Path) -> None:
    """Time against the floor, over the bytes that have to be moved."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    least = [1e6 * size["floor_seconds"] for size in result["sizes"]]
    for name in result["vllm"]:
        times = [1e6 * size["paths"][name]["seconds"] for size in result["sizes"]]
        axes.scatter(least, times, s=18, label=name)
    plain = [1e6 * size["plain_seconds"] for size in result["sizes"]]
    axes.scatter(least, plain, s=18, marker="x", color="grey", label="contiguous copy_ and zero_")
    ends = [min(least), max(least)]
    axes.plot(ends, ends, color="black", linewidth=0.8, label="floor")
    axes.plot(ends, [1.5 * end for end in ends], "k--", linewidth=0.8, label="1.5 × floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("floor, µs")
    axes.set_ylabel("a step's DeepStack path, µs")
    axes.set_title(f"{result['levels']} levels, {result['dtype']}, {device(result)}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def tools(result: dict[str, Any], path: Path) -> None:
    """Where each command's time goes."""
    commands = result["commands"]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(commands) + 1.2), layout="constrained")
    for i, command in enumerate(commands):
        left = 0.0
        for name, seconds in command["parts"].items():
            axes.barh(i, seconds, left=left, edgecolor="white")
            if seconds > 0.08 * command["seconds"]:
                axes.text(left + seconds / 2, i, name, ha="center", va="center", fontsize=6)
            left += seconds
    axes.set_yticks(range(len(commands)), [command["name"] for command in commands])
    axes.invert_yaxis()
    axes.set_xlabel("seconds, the median of the runs")
    axes.set_title(device(result), fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
