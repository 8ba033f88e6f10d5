"""Starts the engines, each in a process of its own, and gathers what they gave."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import ParityError
from .compare import Run
from .engine import STAGE
from .samples import Sample

LOG_PREFIX = re.compile(r"^.*?\.py:\d+\] ")
EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
ROOT = Path(__file__).resolve().parents[2]
# vLLM picks a free port long before it listens there: engines that start at the same time are
# given ports of their own, below those that the system deals out.
PORTS = itertools.count(10_000 + os.getpid() % 400 * 50, 25)


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


class Job:
    """A worker process with its log."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        env: dict[str, str],
        folder: Path,
        suffix: str = ".npz",
    ):
        self.name, self.module, self.arguments, self.env = name, module, arguments, env
        self.log = folder / f"{name}.log"
        self.result = folder / f"{name}{suffix}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, spec: str | Path, pass_fds: tuple[int, ...] = ()) -> None:
        self.result.unlink(missing_ok=True)  # an earlier check's
        with self.log.open("wb") as log:
            command = [
                sys.executable,
                "-m",
                self.module,
                str(spec),
                str(self.result),
                *self.arguments,
            ]
            self.process = subprocess.Popen(
                command,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    def stage(self) -> str:
        """Raises ParityError, with the errors of the log, if the process failed."""
        assert self.process
        if self.process.poll() is None:
            stages = [line for line in self.lines() if line.startswith(STAGE)]
            return stages[-1].removeprefix(STAGE) if stages else "importing"
        if self.process.returncode or not self.result.exists():
            raise ParityError(
                f"{self.name} failed with exit code {self.process.returncode}:\n{self.error()}\n"
                f"Its whole log: {self.log}"
            )
        return "done"

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def error(self) -> str:
        """The exceptions in the log, first to last; its end if there are none."""
        found: dict[str, None] = {}  # a set that keeps the order
        lines = self.lines()
        for number, line in enumerate(lines):
            if match := EXCEPTION.search(line):
                after = [LOG_PREFIX.sub("", more) for more in lines[number + 1 : number + 5]]
                rest = takewhile(lambda more: more.startswith("  "), after)
                found["\n".join([match[1], *rest])] = None
        return "\n".join(found) or "\n".join(lines[-10:])


def engine_job(
    name: str,
    tree: Path | None,
    options: list[str],
    folder: Path,
    cores: list[int],
    module: str = "tools.parity.engine",
    suffix: str = ".npz",
) -> Job:
    """An engine of the installed vLLM, or of the one in `tree`; on `cores` if there are any."""
    env = import_path(tree)
    env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process less to import vLLM in
    env.setdefault("VLLM_PORT", str(next(PORTS)))
    if cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return Job(name, module, options, env, folder, suffix)


def reference_job(model: str, dtype: str, folder: Path) -> Job:
    return Job("transformers", "tools.parity.reference", [model, dtype], import_path(), folder)


def import_path(tree: Path | None = None) -> dict[str, str]:
    """The environment in which a worker finds the project, and the vLLM in `tree` before others."""
    paths = [str(tree.resolve())] if tree else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


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
        ParityError: one of them failed; the others are stopped.
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


@contextmanager
def stopping(jobs: list[Job]) -> Iterator[None]:
    """Stops the jobs that still run at the end, with the processes that they started."""
    try:
        yield
    finally:
        for job in jobs:
            if job.process and job.process.poll() is None:
                os.killpg(job.process.pid, 15)
                try:
                    job.process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(job.process.pid, 9)
                    job.process.wait()  # with what it holds of a GPU


def shared_cores(engines: int) -> list[list[int]]:
    """The machine's cores, dealt out to engines that run at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < engines:
        return [[] for _ in range(engines)]
    share = len(cores) // engines
    return [cores[i * share : (i + 1) * share] for i in range(engines)]
