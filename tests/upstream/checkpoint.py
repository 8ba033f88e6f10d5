"""A pytest plugin: runs the pull requests' tests on other checkpoints and data sets than theirs.

    PYTHONPATH=…/tests/upstream pytest -p checkpoint --checkpoint=PATH [--dataset=PATH] …

Each option replaces the values of the tests' parameter of that name.
"""

from __future__ import annotations

import pytest

OPTIONS = {"model": "--checkpoint", "dataset": "--dataset"}


def pytest_addoption(parser):
    for parameter, option in OPTIONS.items():
        parser.addoption(option, help=f"replaces the values of the parameter {parameter!r}")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Before pytest reads the marks, so that the tests' names tell what they ran on."""
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        option = OPTIONS.get(mark.args[0]) if mark.name == "parametrize" else None
        if option and (value := metafunc.config.getoption(option)):
            marks[i] = pytest.mark.parametrize(mark.args[0], [value], **mark.kwargs).mark
