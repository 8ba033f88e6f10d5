"""What the tests on a GPU measured: `pytest -m gpu --figures FILE` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import cli

from .conftest import version


class Figures:
    """Gathers the tests' figures, and writes them with machine, versions and command."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":  # what fixtures measured is there by then
            outcome = self.outcomes.get(report.nodeid)
            for name, values in report.user_properties:
                if name == "figures":
                    assert isinstance(values, dict)
                    self.rows.append({"test": report.nodeid, "outcome": outcome, **values})

    def pytest_sessionfinish(self) -> None:
        from benchmarks.machine import machine  # it calls CUDA: not before the last fork

        about = {"vllm": version(), "machine": machine()}
        cli.write_json({"about": about, "rows": self.rows}, self.file)
