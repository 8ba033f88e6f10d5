"""What the runs amount to: accuracies with their intervals, and where runs differ."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from .runs import Outcome

matplotlib.use("Agg")
from matplotlib import pyplot


def summary(outcome: Outcome) -> dict[str, Any]:
    answers = outcome.answers
    right, count = sum(a.correct for a in answers), len(answers)
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    seconds, tokens = sum(a.seconds for a in answers), sum(a.tokens for a in answers)
    return {
        "run": outcome.run.name,
        **outcome.meta,
        "correct": right,
        "questions": count,
        "accuracy": right / count,
        "interval_95": [interval.low, interval.high],
        "unboxed": sum(a.boxed is None for a in answers),
        "cut_off": sum(a.finish_reason == "length" for a in answers),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def difference(one: Outcome, other: Outcome) -> dict[str, Any]:
    """The numbers of the questions on which two runs box different answers."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    return {
        "runs": [one.run.name, other.run.name],
        "same": sum(a.boxed == b.boxed for a, b in pairs),
        "differ": [a.number for a, b in pairs if a.boxed != b.boxed],
    }


def report(outcomes: list[Outcome], settings: dict[str, Any]) -> dict[str, Any]:
    """Differences are to the first run; the commonest answer is the best guess without looking."""
    ((answer, times),) = Counter(a.answer for a in outcomes[0].answers).most_common(1)
    return {
        **settings,
        "commonest": {"answer": answer, "share": times / len(outcomes[0].answers)},
        "runs": [summary(outcome) for outcome in outcomes],
        "differences": [difference(outcomes[0], other) for other in outcomes[1:]],
    }


def label(run: dict[str, Any]) -> str:
    mode = run["run"].partition("@")[0]
    return f"{run['software']}, {mode}" if mode in ("eager", "compiled") else run["software"]


def dtypes(result: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(run["dtype"] or "served" for run in result["runs"]))


def show(result: dict[str, Any], console: Console) -> None:
    console.print(
        f"{result['model']} on {result['dataset']}, {result['split']} split, "
        f"{result['runs'][0]['questions']} questions, greedy, {dtypes(result)}"
        + (", blank images" if result["blank_images"] else ""),
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    first = result["runs"][0]["run"]
    widths = {"accuracy": 8, "95 %": 11, "same": 6, "time": 7, "tokens/s": 8}
    for heading, width in widths.items():
        table.add_column(heading, justify="right", min_width=width)
    same = {d["runs"][1]: d["same"] for d in result["differences"]}
    for run in result["runs"]:
        low, high = run["interval_95"]
        rate = run["tokens_per_second"]
        table.add_row(
            label(run),
            f"{run['accuracy']:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{same[run['run']] / run['questions']:.1%}" if run["run"] in same else "",
            f"{run['seconds']:.1f} s",
            f"{rate:.0f}" if rate else "–",
        )
    console.print(table)
    if len(result["runs"]) > 1:
        console.print(f"same: boxed answers as of {label(result['runs'][0])}")
    if result["blank_images"]:
        guess = result["commonest"]
        console.print(f"always answering {guess['answer']}: {guess['share']:.3f}")
    for d in result["differences"]:
        if d["differ"]:
            numbers = [str(number) for number in d["differ"]]
            more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
            console.print(
                f"{d['runs'][1]} differs from {first} on {len(numbers)}: "
                f"{', '.join(numbers[:10])}{more}",
                highlight=False,
                soft_wrap=True,
            )
    for run in result["runs"]:
        if run["cut_off"]:
            console.print(
                f"{run['run']}: {run['cut_off']} responses were cut off at --max-tokens",
                style="yellow",
            )


def plot(result: dict[str, Any], file: Path) -> None:
    """Bars of accuracy with their intervals."""
    runs = result["runs"][::-1]
    accuracies = [run["accuracy"] for run in runs]
    below = [run["accuracy"] - run["interval_95"][0] for run in runs]
    above = [run["interval_95"][1] - run["accuracy"] for run in runs]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.55 * len(runs)), layout="constrained")
    bars = axes.barh(
        [label(run) for run in runs],
        accuracies,
        xerr=[below, above],
        color="#4c72b0",
        ecolor="#333333",
        capsize=3,
    )
    axes.bar_label(bars, [f" {accuracy:.3f}" for accuracy in accuracies], padding=4)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel(f"accuracy, {runs[0]['questions']} questions, {dtypes(result)} (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
