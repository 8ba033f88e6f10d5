"""Starts the engines, each in a process of its own, and gathers what they gave."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .compare import Run
from .modes import Mode
from .processes import EngineError, Job, bound, engine_job, import_path, shared_cores, stopping
from .samples import Sample

ENGINE = f"{__package__}.engine"


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
    replay_error: str = ""
    """How it failed in a mode that it replays in, and that has no result."""
    replays: dict[str, Result] = field(default_factory=dict)
    """By mode, what the same engine gave where its steps were replayed."""

    @classmethod
    def load(cls, file: Path) -> Result:
        """What an engine's process has written."""
        with np.load(file) as data:
            count = sum(key.startswith("tokens_") for key in data)
            meta = json.loads(str(data["meta"]))
            return cls(
                meta,
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
                seconds=meta.get("seconds", 0.0),
            )


def reference_job(model: str, dtype: str, folder: Path) -> Job:
    return Job("transformers", f"{__package__}.reference", [model, dtype], import_path(), folder)


def arm_job(
    mode: Mode,
    tree: Path | None,
    options: list[str],
    folder: Path,
    name: str = "",
    replays: Iterable[Mode] = (),
) -> Job:
    """An engine in a mode, and then in those that replay on it. `options` are vLLM's."""
    names = ",".join(each.name for each in (mode, *replays))
    arguments = [names, *options, *mode.options]
    job = engine_job(name or mode.name, tree, arguments, folder, [], ENGINE)
    job.env |= dict(mode.env)
    # Workers in other processes are sent functions: what they run, and models without levels.
    job.env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return job


def write_spec(
    samples: list[Sample],
    builtin: bool,
    max_tokens: int,
    folder: Path,
    probes: bool = False,
    chat: dict[str, Any] | None = None,
) -> Path:
    """A job for engines; with `probes` they look for leaks, too. `chat`: for Transformers, what
    `LLM.chat` was given."""
    spec: dict[str, Any] = {
        "samples": [asdict(sample) for sample in samples],
        "builtin": builtin,
        "max_tokens": max_tokens,
        "probes": probes,
        "chat": chat or {},
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
    jobs: list[Job],
    spec: Path,
    console: Console,
    at_once: int,
    needed: Iterable[Job] = (),
    seconds: float = math.inf,
) -> list[Result | EngineError]:
    """The same, with the errors of those that failed, or took longer. Several at a time have cores
    of their own. With those that are `needed` (default: the first) the others are compared: where
    one fails, no more are run."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    live, began = console.is_terminal, time.monotonic()
    needed = list(needed) or jobs[:1]
    found: dict[Job, Result | EngineError] = {}
    with Progress(*columns, console=console, disable=not live) as progress, stopping(jobs):
        tasks = {
            job: progress.add_task(job.name, start=False, stage="waiting", total=1) for job in jobs
        }
        waiting, places, shares = jobs[::-1], dict[int, Job](), shared_cores(at_once)
        stages, started = dict[Job, str](), dict[Job, float]()
        while waiting or places:
            for place, cores in enumerate(shares):
                if place not in places and waiting:
                    job = places[place] = waiting.pop()
                    if at_once > 1:
                        job.env |= bound(cores)
                    stages[job], started[job] = "", time.monotonic()
                    for mode in replays_of(job):
                        earlier = job.result.with_name(f"{mode}.npz")
                        earlier.unlink(missing_ok=True)
                    job.start(spec)
                    progress.start_task(tasks[job])
            time.sleep(0.2)
            for place, job in list(places.items()):
                late = time.monotonic() - started[job] > seconds
                stage, outcome = poll(job, f"took longer than {seconds:.0f} s" if late else "")
                if stage != stages[job] and not live:
                    text = f"{job.name}: {stage} ({time.monotonic() - began:.0f} s)"
                    console.print(text, highlight=False)
                stages[job] = stage
                progress.update(tasks[job], stage=stage, completed=int(outcome is not None))
                if isinstance(outcome, Result):
                    replayed = sum(each.seconds for each in outcome.replays.values())
                    outcome.seconds = time.monotonic() - started[job] - replayed
                if outcome is not None:
                    job.stop()
                    found[job] = outcome
                    del places[place]
            for job in needed:
                if isinstance(first := found.get(job), EngineError):
                    raise first
    return [found[job] for job in jobs]


def poll(job: Job, ended: str = "") -> tuple[str, Result | EngineError | None]:
    """What a job is doing; and once it has ended, what it gave: of one that failed after it had
    answered the samples, those, with the error. `ended`: why it is to end now."""
    try:
        stage = job.stage()
        if ended and stage != "done":
            job.stop()
            raise EngineError(f"{job.name} {ended}, while {stage}\nIts whole log: {job.log}")
    except EngineError as error:
        if not job.result.exists():
            return "failed", error
        return "failed", load(job, error)
    return stage, load(job) if stage == "done" else None


def replays_of(job: Job) -> list[str]:
    return job.arguments[0].split(",")[1:] if job.module == ENGINE else []


def load(job: Job, error: EngineError | None = None) -> Result:
    """What a job gave in its modes; if it failed, the one in which it did has the error: eager, the
    first that gave nothing, or else the last."""
    first = Result.load(job.result)
    done = not replays_of(job) or first.meta.get("done")
    last = first
    for mode in replays_of(job):
        file = job.result.with_name(f"{mode}.npz")
        if file.exists():
            last = first.replays[mode] = Result.load(file)
        elif error and done:
            first.replay_error = str(error)
            return first
    if error:
        (last if done else first).error = str(error)
    return first
