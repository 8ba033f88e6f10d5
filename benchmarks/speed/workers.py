"""Processes that hold one vLLM each and take turns: what is compared is measured in one run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_deepstack.check.processes import Job, import_path, stopping
from vllm_deepstack.cli import UserError

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Variant:
    """A vLLM under the name that it has in the results; without a tree, the installed one."""

    name: str
    tree: Path | None
    eager: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`NAME`, `NAME=TREE`.

        Raises:
            UserError: there is no vLLM in the tree.
        """
        name, _, tree = text.partition("=")
        if tree and not (Path(tree) / "vllm").is_dir():
            raise UserError(f"--vllm {text}: {tree} does not contain vllm/")
        return cls(name, Path(tree) if tree else None)


class Worker:
    """A process that does what it is asked, and is stopped meanwhile.

    It would not be idle: vLLM's worker processes, of which there are some on CPUs, ask for work
    without a pause for a second after the last of it. On two cores that made the others' steps
    4 times as long, and a first token 30 times.
    """

    def __init__(self, variant: Variant, module: str, folder: Path):
        self.variant = variant
        env = import_path(variant.tree)
        for cache in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
            env[cache] = str(folder / f"{variant.name}-{cache.lower()}")  # empty at first
        env.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are timed in the worker
        self.job = Job(variant.name, module, [], env, folder)
        self.connection: Connection | None = None

    def start(self) -> None:
        self.connection, theirs = Pipe()
        self.job.start(str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        theirs.close()

    def tell(self, action: str, **how: Any) -> None:
        assert self.connection
        self.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.connection.send((action, how))

    def answer(self) -> Any:
        """What the last action gave.

        Raises:
            UserError: the process has ended, with the errors of its log.
        """
        assert self.connection
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self.job.failure("--logs FOLDER keeps it") from None
        self.send_signal(signal.SIGSTOP)
        return answer

    def ask(self, action: str, **how: Any) -> Any:
        self.tell(action, **how)
        return self.answer()

    def send_signal(self, number: signal.Signals) -> None:
        if self.job.process and self.job.process.poll() is None:
            os.killpg(self.job.process.pid, number)

    def stop(self) -> None:
        """Returns once the process has given back what it held."""
        self.send_signal(signal.SIGCONT)
        if self.connection:
            self.connection.close()
        if self.job.process:
            self.job.process.wait(60)


@contextlib.contextmanager
def workers(variants: list[Variant], module: str, logs: Path | None) -> Iterator[list[Worker]]:
    """Not started yet; those that still run at the end are stopped. Logs are kept if asked."""
    with tempfile.TemporaryDirectory(prefix="speed.") as temporary:
        folder = Path(temporary)
        every = [Worker(variant, module, folder) for variant in variants]
        try:
            with stopping([worker.job for worker in every]):
                try:
                    yield every
                finally:
                    for worker in every:
                        worker.send_signal(signal.SIGCONT)
        finally:
            if logs:
                logs.mkdir(parents=True, exist_ok=True)
                for log in folder.glob("*.log"):
                    shutil.copy(log, logs)


def serve(descriptor: str, actions: Any) -> None:
    """The worker's side: calls what it is asked for until nobody asks any more."""
    if sys.platform == "linux":
        # One that is stopped would outlive its parent, and keep its memory.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(descriptor))
    with contextlib.suppress(EOFError):
        while True:
            action, how = connection.recv()
            connection.send(getattr(actions, action)(**how))
