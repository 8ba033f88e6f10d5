"""Models that were written from the rules' text, by somebody who did not see the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_deepstack import ROOT
from vllm_deepstack.lint.rules import RULES
from vllm_deepstack.lint.verb import lint

CORPUS = Path(__file__).parent / "corpus"
WRONG, RIGHT = (sorted((CORPUS / name).glob("*.py")) for name in ("wrong", "right"))
EXPECTED = {
    (file.name, code)
    for file in WRONG
    for codes in re.findall(r"# expect: (DS\d+(?:, DS\d+)*)", file.read_text())
    for code in codes.split(", ")
}
MISSES = {
    ("count_of_features_not_rows.py", "DS002"): "rows by a count",
    ("namedtuple_made_anew.py", "DS003"): "objects that are exchanged",
    ("namedtuple_made_anew.py", "DS004"): "objects that are exchanged",
}
"""What it does not see, by the beginning of a line in docs/lint.md that says why."""


def codes(file: Path) -> set[str]:
    return {finding.code for finding in lint([file], None, list(RULES))[0]}


@pytest.fixture(scope="module")
def found() -> set[tuple[str, str]]:
    return {(file.name, code) for file in WRONG for code in codes(file)}


def test_all_is_there():
    assert (len(WRONG), len(RIGHT), len(EXPECTED)) == (50, 26, 60)
    assert {code for _, code in EXPECTED} == set(RULES)


def test_what_is_wrong_is_found_but_for_what_is_known(found):
    assert EXPECTED - found == set(MISSES)


def test_nine_of_ten_wrong_files_are_reported(found):
    assert len({file for file, _ in EXPECTED & found}) >= 45


def test_nothing_else_is_reported(found):
    assert found <= EXPECTED


@pytest.mark.parametrize("file", RIGHT, ids=lambda file: file.stem)
def test_what_is_right_is_not_accused(file):
    assert codes(file) == set()


def test_the_docs_name_each_miss():
    _, section = (ROOT / "docs/lint.md").read_text().split("## What it does not see")
    for reason in MISSES.values():
        assert f"- {reason[0].upper()}{reason[1:]}" in section
