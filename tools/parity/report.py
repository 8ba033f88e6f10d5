"""The check's result, as a table for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import ParityError
from .compare import TOLERANCE, Difference, compare
from .run import Result

Report = dict[str, Any]


def report(
    model: str, eager: Result, compiled: Result, reference: Result | None, tolerance: float | None
) -> Report:
    """Compares the results, sample by sample.

    Raises:
        ParityError: the engines were not given the same tokens.
    """
    dtype = eager.meta["dtype"]
    tolerance = TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) if tolerance is None else tolerance
    samples, text_only = [], []
    for i, prompt in enumerate(eager.prompts):
        for name, other in (("compiled", compiled), ("Transformers", reference)):
            if other is not None and not np.array_equal(prompt, other.prompts[i]):
                raise ParityError(
                    f"sample {i}: {name} was given other tokens than eager: {len(other.prompts[i])} and {len(prompt)}"
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
            sample["compiled_to_transformers"] = asdict(compare(reference.runs[i], compiled.runs[i]))
        samples.append(sample)
    return {
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
    return "–" if value is None else f"{value:.2g}"


def show(reports: list[Report], console: Console) -> None:
    """Prints reports on the same samples side by side, and a verdict for each."""
    table = Table(title=f"{reports[0]['model']}, {reports[0]['dtype']}: compiled against eager", title_justify="left")
    table.add_column("sample", justify="right")
    table.add_column("tokens\nprompt", justify="right")
    table.add_column("\nimage", justify="right")
    for one in reports:
        for title in (f"vLLM {one['vllm']}\n|Δlogit| first", "\ndecode", "\nKL", "\ntokens"):
            table.add_column(title, justify="right")
        if one["transformers"]:
            table.add_column(f"to Transformers {one['transformers']}\n|Δlogit| eager", justify="right")
            table.add_column("\ncompiled", justify="right")
    for i, sample in enumerate(reports[0]["samples"]):
        row = [str(i + 1), str(sample["prompt_tokens"]), str(sample["image_tokens"])]
        for one in reports:
            entry = one["samples"][i]
            style = "green" if entry["agrees"] else "bold red"
            c = Difference(**entry["compiled"])
            cells = [number(c.first), number(c.decode), number(c.kl), f"{c.agreed}/{c.steps}"]
            row += [f"[{style}]{cell}[/]" for cell in cells]
            if one["transformers"]:
                for side in ("eager", "compiled"):
                    row.append(number(Difference(**entry[f"{side}_to_transformers"]).largest))
        table.add_row(*row)
    console.print(table)
    for one in reports:
        wrong = sum(not sample["agrees"] for sample in one["samples"])
        total, tolerance = len(one["samples"]), one["tolerance"]
        floor = "" if one["noise_floor"] is None else f"; text-only samples differ by {number(one['noise_floor'])}"
        verdict = (
            f"[bold red]diverges[/] on {wrong} of {total} samples" if wrong else f"[green]agrees[/] on {total} samples"
        )
        console.print(f"vLLM {one['vllm']}: compiled {verdict} (tolerance {tolerance:g}{floor})", highlight=False)
