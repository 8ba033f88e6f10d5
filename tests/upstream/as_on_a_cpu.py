"""A pytest plugin: upstream's tests, as they are, on a machine without a GPU or a model hub.

What they ask of a GPU, the CPU gives. The file `$OUTCOMES` gets a line of JSON for each test.
"""

from __future__ import annotations

import gc
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
import torch
from torch.overrides import TorchFunctionMode


class OnACpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def pytest_configure(config):
    import vllm

    if not Path(vllm.__file__).is_relative_to(Path.cwd()):
        raise pytest.UsageError(f"vLLM is imported from {vllm.__file__}, not from {Path.cwd()}")
    config.pluginmanager.register(Outcomes(Path(os.environ["OUTCOMES"])))


class Outcomes:
    def __init__(self, file: Path):
        self.file = file.open("w", buffering=1)
        self.write(versions={name: version(name) for name in ("torch", "transformers")})

    def write(self, **values: Any) -> None:
        print(json.dumps(values), file=self.file)

    def pytest_collectreport(self, report):
        if not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=why(report.longrepr))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=why(report.longrepr))


def why(longrepr: Any) -> str:
    """In one line; nothing of a test that passed."""
    if isinstance(longrepr, tuple):  # skipped
        text = longrepr[2]
    elif crash := getattr(longrepr, "reprcrash", None):
        text = crash.message
    else:
        text = str(longrepr or "").rpartition("\nE ")[2]
    return " ".join(text.split())


def pytest_collection_finish():
    """Upstream collects garbage after each test: of what is there by now, nothing is."""
    gc.collect()
    gc.freeze()
    mock.patch("gc.unfreeze").start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a test switches it off for all later ones
    with OnACpu():
        return (yield)
