"""What the tests on a GPU measured: `pytest -m gpu --figures FILE` writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import command
from vllm_deepstack import ROOT, cli

from .conftest import version


class Figures:
    """Gathers the tests' figures, and writes them with machine, versions and command as each test
    ends: a run that is stopped leaves those of the tests that it has done."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.outcomes: dict[str, str] = {}

    @cached_property
    def about(self) -> dict[str, Any]:
        # In a process of its own: it calls CUDA, and the tests fork off from this one.
        script = "import json; from benchmarks.machine import machine; print(json.dumps(machine()))"
        ask = [sys.executable, "-c", script]
        told = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
        return {"vllm": version(), "machine": json.loads(told.stdout) | {"command": command()}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":  # what fixtures measured is there by then
            outcome = self.outcomes.get(report.nodeid)
            for name, values in report.user_properties:
                if name == "figures":
                    assert isinstance(values, dict)
                    self.rows.append({"test": report.nodeid, "outcome": outcome, **values})
            cli.write_json({"about": self.about, "rows": self.rows}, self.file)
