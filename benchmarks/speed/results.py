"""What the benchmarks of this folder have in common: their options, and how results are shown."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_deepstack.cli import UserError


def add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vllm",
        nargs="+",
        default=["fork"],
        metavar="NAME[=TREE]",
        help="what is compared: a name for the installed vLLM, or for the one in a folder that "
        "contains vllm/ (default: fork, installed)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("speed-results"),
        help="where the result goes, as JSON and as a plot (default: speed-results)",
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the processes' logs")


def claim(folder: Path) -> None:
    """Before anything is measured.

    Raises:
        UserError: results cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder}: is not writable")


def spread(values: Any) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def times(ratio: dict[str, float]) -> str:
    """A ratio and its quartiles; by itself where it was measured once."""
    low, high = (f"{ratio[end]:.3f}" for end in ("low", "high"))
    return f"× {ratio['median']:.3f}" + (f" ({low}–{high})" if ratio["low"] < ratio["high"] else "")


def of_which(command: dict[str, Any]) -> str:
    """The parts of a command's time, and the least that it can take."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in command["parts"].items())
    least = command.get("least_seconds")
    return parts + (f"; importing LibCST and parsing alone {least:.1f}" if least else "")


def device(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return machine["gpus"][0] if machine["gpus"] else f"{machine['cores']} cores, {machine['cpu']}"


def progress(console: Console) -> Progress:
    """A bar with what is being done; where nobody watches, none."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description}", markup=False)
    return Progress(*columns, text, console=console, disable=not console.is_terminal)
