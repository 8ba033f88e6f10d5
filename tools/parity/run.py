"""Starts the engines, each in a process of its own, and gathers what they gave."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..engines import Job, import_path, stopping
from .compare import Run
from .samples import Sample

ENGINE = f"{__package__}.engine"  # tools.parity, or vllm_deepstack.parity


@dataclass
class Result:
    """What one engine gave for all samples."""

    meta: dict[str, str]
    prompts: list[np.ndarray]
    images: list[int]
    image_tokens: list[int]
    runs: list[Run]

    @classmethod
    def load(cls, file: Path) -> Result:
        """What an engine's process has written."""
        with np.load(file) as data:
            count = sum(key.startswith("tokens_") for key in data)
            return cls(
                json.loads(str(data["meta"])),
                [data[f"prompt_{i}"] for i in range(count)],
                [int(data.get(f"images_{i}", 0)) for i in range(count)],
                [int(data.get(f"image_tokens_{i}", 0)) for i in range(count)],
                [Run(data[f"tokens_{i}"], data[f"logits_{i}"]) for i in range(count)],
            )


def reference_job(model: str, dtype: str, folder: Path) -> Job:
    return Job("transformers", f"{__package__}.reference", [model, dtype], import_path(), folder)


def write_spec(samples: list[Sample], builtin: bool, max_tokens: int, folder: Path) -> Path:
    spec: dict[str, Any] = {
        "samples": [asdict(sample) for sample in samples],
        "builtin": builtin,
        "max_tokens": max_tokens,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(spec))
    return path


def run(jobs: list[Job], spec: Path, console: Console, side_by_side: bool) -> list[Result]:
    """Runs the jobs one after the other, or all at once.

    Raises:
        UserError: one of them failed; the others are stopped.
    """
    batches = [jobs] if side_by_side else [[job] for job in jobs]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    live = console.is_terminal
    with Progress(*columns, console=console, disable=not live) as progress, stopping(jobs):
        tasks = {
            job: progress.add_task(job.name, start=False, stage="waiting", total=1) for job in jobs
        }
        for batch in batches:
            for job in batch:
                job.start(spec)
                progress.start_task(tasks[job])
            stages = dict.fromkeys(batch, "")
            while set(stages.values()) != {"done"}:
                time.sleep(0.2)
                for job in batch:
                    stage = job.stage()
                    if stage != stages[job] and not live:
                        console.print(f"{job.name}: {stage}", highlight=False)
                    stages[job] = stage
                    progress.update(tasks[job], stage=stage, completed=int(stage == "done"))
    return [Result.load(job.result) for job in jobs]
