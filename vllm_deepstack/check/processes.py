"""vLLM engines in processes of their own: how they are started, what they log, how they end."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..cli import UserError

STAGE = "[stage] "
"""Begins a line of a process's log that says what it is doing."""
LOG_PREFIX = re.compile(r"^.*?\.py:\d+\] ")
EXCEPTION = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
# vLLM picks a free port long before it listens there: engines that start at the same time are
# given ports of their own, below those that the system deals out.
PORTS = itertools.count(10_000 + os.getpid() % 400 * 50, 25)


class EngineError(UserError):
    """A process of an engine failed."""


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
        self.ended = False

    def start(self, spec: str | Path, pass_fds: tuple[int, ...] = ()) -> None:
        self.result.unlink(missing_ok=True)  # an earlier run's
        self.ended = False
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

    def signal(self, number: int) -> None:
        """To the process, and to those that it has started, also if it has ended before them."""
        with suppress(ProcessLookupError):  # its group outlives it as long as it has members
            if self.process and not self.ended:
                os.killpg(self.process.pid, number)

    def stop(self, seconds: float = 10.0) -> None:
        if self.process is None or self.ended:
            return
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        finally:
            self.signal(signal.SIGKILL)
            self.ended = True  # the number may be another's later
            self.process.wait()  # with what it holds of a GPU

    def stage(self) -> str:
        """What it is doing.

        Raises:
            EngineError: it failed; the message has the errors of its log.
        """
        assert self.process
        if self.process.poll() is None:
            stages = [line for line in self.lines() if line.startswith(STAGE)]
            return stages[-1].removeprefix(STAGE) if stages else "importing"
        if self.process.returncode or not self.result.exists():
            raise self.failure()
        return "done"

    def failure(self, log: str = "") -> EngineError:
        """Of a process that has ended, or is about to: the errors of its log, and its exit code,
        which only the process that started it is told. `log` says where the whole of the log is,
        if not in the job's folder."""
        assert self.process
        code = self.process.wait()
        ended = f"failed with exit code {code}" if code else "died"
        return EngineError(
            f"{self.name} {ended}:\n{self.error()}\nIts whole log: {log or self.log}"
        )

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
    module: str,
    suffix: str = ".npz",
) -> Job:
    """An engine of the installed vLLM, or of the one in `tree`; on `cores` if there are any."""
    env = import_path(tree)
    env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process less to import vLLM in
    env.setdefault("VLLM_PORT", str(next(PORTS)))
    env |= bound(cores)
    return Job(name, module, options, env, folder, suffix)


def bound(cores: list[int]) -> dict[str, str]:
    """The environment of a CPU's engine on so few cores. Later releases bind no worker that is in
    the engine's own process: two that run at once would wait for each other's threads."""
    if not cores:
        return {}
    bind = ",".join(map(str, cores))
    return {"VLLM_CPU_OMP_THREADS_BIND": bind, "OMP_NUM_THREADS": str(len(cores))}


def import_path(tree: Path | None = None) -> dict[str, str]:
    """The environment in which a worker finds the project, and the vLLM in `tree` before others."""
    paths = [tree.resolve()] if tree else []
    paths.append(Path(__file__).resolve().parents[2])
    before = filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *before])}


@contextmanager
def stopping(jobs: list[Job]) -> Iterator[None]:
    """Stops the jobs that still run at the end, with the processes that they started."""
    try:
        yield
    finally:
        until = time.monotonic() + 10
        try:
            for job in jobs:
                job.signal(signal.SIGTERM)
            for job in jobs:
                if job.process:
                    with suppress(subprocess.TimeoutExpired):
                        job.process.wait(max(0.0, until - time.monotonic()))
        finally:  # also if somebody loses patience
            for job in jobs:
                job.stop(0)


def shared_cores(engines: int) -> list[list[int]]:
    """The machine's cores, dealt out to engines that run at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < engines:
        return [[] for _ in range(engines)]
    share = len(cores) // engines
    return [cores[i * share : (i + 1) * share] for i in range(engines)]


def make_engine(options: list[str]) -> Any:
    """An engine with the options of `vllm serve`."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return LLM(**vars(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(options)))


def vllm_name() -> str:
    """The version of the vLLM that is imported; of one that is fixed, with a word that it is."""
    from vllm import __version__

    if "deepstack" not in __version__ and find_spec("vllm.model_executor.models.deepstack"):
        return f"{__version__} with vllm-deepstack"  # patched, or by the plugin
    return __version__
