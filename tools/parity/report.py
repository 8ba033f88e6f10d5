"""The check's result, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..cli import UserError
from .compare import TOLERANCE, Difference, compare
from .run import Result

Report = dict[str, Any]
SCHEMA = 1
"""Of a report: docs/schemas/check.json. Another number when a field changes its meaning."""


def report(
    model: str, eager: Result, compiled: Result, reference: Result | None, tolerance: float | None
) -> Report:
    """Compares the results, sample by sample.

    Raises:
        UserError: the engines were not given the same tokens.
    """
    dtype = eager.meta["dtype"]
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) if tolerance is None else tolerance
    samples, text_only = [], []
    for i, prompt in enumerate(eager.prompts):
        for name, other in (("compiled", compiled), ("Transformers", reference)):
            if other is not None and not np.array_equal(prompt, other.prompts[i]):
                raise UserError(
                    f"sample {i + 1}: {name} was given other tokens than eager: "
                    f"{len(other.prompts[i])} and {len(prompt)} of them"
                )
        difference = compare(eager.runs[i], compiled.runs[i])
        sample = {
            "prompt_tokens": len(prompt),
            "images": eager.images[i],
            "image_tokens": eager.image_tokens[i],
            "compiled": asdict(difference),
            "agrees": difference.largest <= tolerance,
        }
        if not eager.images[i]:
            text_only.append(difference.largest)
        if reference is not None:
            sample["eager_to_transformers"] = asdict(compare(reference.runs[i], eager.runs[i]))
            sample["compiled_to_transformers"] = asdict(
                compare(reference.runs[i], compiled.runs[i])
            )
        samples.append(sample)
    return {
        "schema": SCHEMA,
        "model": model,
        "vllm": eager.meta["vllm"],
        "transformers": reference.meta["transformers"] if reference else None,
        "dtype": dtype,
        "tolerance": tolerance,
        "noise_floor": max(text_only, default=None),
        "samples": samples,
        "agrees": all(s["agrees"] for s in samples),
    }


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.0e}"


def columns(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show(reports: list[Report], console: Console) -> None:
    """Prints reports on the same samples side by side, and a verdict for each."""
    about = columns("#", "tokens", "image")
    for i, sample in enumerate(reports[0]["samples"]):
        about.add_row(str(i + 1), str(sample["prompt_tokens"]), str(sample["image_tokens"]))
    parts = [about]
    for one in reports:
        part = columns("first", "decode", "KL", "same")
        if one["transformers"]:
            part.add_column("eager–HF", justify="right", no_wrap=True)
            part.add_column("compiled–HF", justify="right", no_wrap=True)
        for sample in one["samples"]:
            c = Difference(**sample["compiled"])
            row = [number(c.first), number(c.decode), number(c.kl), f"{c.agreed}/{c.steps}"]
            if one["transformers"]:
                for side in ("eager", "compiled"):
                    row.append(number(Difference(**sample[f"{side}_to_transformers"]).largest))
            part.add_row(*row, style="green" if sample["agrees"] else "bold red")
        parts.append(part)
    grid = Table.grid(padding=(0, 1))
    grid.add_row("", *(f" vLLM {one['vllm']}" for one in reports))
    grid.add_row(*parts)
    console.print(
        f"{reports[0]['model']}, {reports[0]['dtype']}, compiled against eager:", highlight=False
    )
    console.print(
        "largest |Δlogit| (first token, decoding) and KL (nats), tokens that are the same"
    )
    if reports[0]["transformers"]:
        console.print(f"HF: Transformers {reports[0]['transformers']}, largest |Δlogit|")
    console.print(grid)
    for one in reports:
        wrong, total = sum(not sample["agrees"] for sample in one["samples"]), len(one["samples"])
        verdict = f"[bold red]diverges[/] on {wrong} of" if wrong else "[green]agrees[/] on"
        floor = "" if one["noise_floor"] is None else f"; noise floor {number(one['noise_floor'])}"
        console.print(
            f"vLLM {one['vllm']}: compiled {verdict} {total} samples "
            f"(tolerance {one['tolerance']:g}{floor})",
            highlight=False,
            soft_wrap=True,
        )


def main() -> int:
    """Shows reports that were written with `--json`; the last one's verdict is the exit code."""
    reports = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    show(reports, Console())
    return 0 if reports[-1]["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
