"""A worker with a thread that spins after its work, as vLLM's do: started by the tests."""

from __future__ import annotations

import os
import sys
import time
from threading import Thread

from benchmarks.speed.workers import serve


class Spinning:
    def start(self) -> int:
        Thread(target=spin, daemon=True).start()
        return os.getpid()

    def cpu_seconds(self) -> float:
        return time.process_time()


def spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    serve(sys.argv[1], Spinning())
