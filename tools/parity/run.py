"""Starts the engines, each in a process of its own, and gathers what they gave."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..engines import EngineError, Job, engine_job, import_path, stopping
from .compare import Run
from .modes import EAGER, Mode
from .samples import Sample

ENGINE = f"{__package__}.engine"  # tools.parity, or vllm_deepstack.parity


@dataclass
class Result:
    """What one engine gave for all samples."""

    meta: dict[str, Any]
    prompts: list[np.ndarray]
    images: list[int]
    image_tokens: list[int]
    runs: list[Run]
    alone: dict[str, Run] = field(default_factory=dict)
    """What its short requests got alone, if it was asked for leaks."""
    seconds: float = 0.0
    """Of its process."""
    error: str = ""
    """How it failed after that."""

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
                {
                    str(data[f"alone_{i}"]): Run(
                        data[f"alone_tokens_{i}"], data[f"alone_logits_{i}"]
                    )
                    for i in range(sum(key.startswith("alone_tokens_") for key in data))
                },
            )


def reference_job(model: str, dtype: str, folder: Path) -> Job:
    return Job("transformers", f"{__package__}.reference", [model, dtype], import_path(), folder)


def arm_job(
    mode: Mode,
    tree: Path | None,
    options: list[str],
    folder: Path,
    cores: list[int],
    name: str = "",
) -> Job:
    """An engine in a mode. `options` are vLLM's."""
    arguments = [mode.name, *options, *mode.options]
    job = engine_job(name or mode.name, tree, arguments, folder, cores, ENGINE)
    job.env |= dict(mode.env)
    if mode == EAGER:
        job.env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model`, in several workers
    return job


def write_spec(
    samples: list[Sample], builtin: bool, max_tokens: int, folder: Path, probes: bool = False
) -> Path:
    """A job for engines; with `probes` they look for leaks, too."""
    spec: dict[str, Any] = {
        "samples": [asdict(sample) for sample in samples],
        "builtin": builtin,
        "max_tokens": max_tokens,
        "probes": probes,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(spec))
    return path


def run(jobs: list[Job], spec: Path, console: Console, at_once: int) -> list[Result]:
    """Runs the jobs, so many at a time.

    Raises:
        EngineError: one of them failed.
    """
    results = []
    for result in outcomes(jobs, spec, console, at_once):
        if isinstance(result, EngineError):
            raise result
        if result.error:
            raise EngineError(result.error)
        results.append(result)
    return results


def outcomes(
    jobs: list[Job], spec: Path, console: Console, at_once: int
) -> list[Result | EngineError]:
    """The same, with the errors of those that failed. The first is what others are compared with:
    where it fails, they are not run."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    live = console.is_terminal
    found: dict[Job, Result | EngineError] = {}
    with Progress(*columns, console=console, disable=not live) as progress, stopping(jobs):
        tasks = {
            job: progress.add_task(job.name, start=False, stage="waiting", total=1) for job in jobs
        }
        for start in range(0, len(jobs), at_once):
            running = dict.fromkeys(jobs[start : start + at_once], "")
            began = time.monotonic()
            for job in running:
                job.start(spec)
                progress.start_task(tasks[job])
            while running:
                time.sleep(0.2)
                for job in list(running):
                    stage, outcome = poll(job)
                    if stage != running[job] and not live:
                        console.print(f"{job.name}: {stage}", highlight=False)
                    running[job] = stage
                    progress.update(tasks[job], stage=stage, completed=int(outcome is not None))
                    if isinstance(outcome, Result):
                        outcome.seconds = time.monotonic() - began
                    if outcome is not None:
                        found[job] = outcome
                        del running[job]
                if isinstance(first := found.get(jobs[0]), EngineError):
                    raise first
    return [found[job] for job in jobs]


def poll(job: Job) -> tuple[str, Result | EngineError | None]:
    """What a job is doing; and once it has ended, what it gave: of one that failed after it had
    answered the samples, those, with the error."""
    try:
        stage = job.stage()
    except EngineError as error:
        if not job.result.exists():
            return "failed", error
        result = Result.load(job.result)
        result.error = str(error)
        return "failed", result
    return stage, Result.load(job.result) if stage == "done" else None
