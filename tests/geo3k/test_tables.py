"""The README's tables of logits are what `python -m benchmarks.logits` prints."""

import pytest

from benchmarks.logits.__main__ import table
from vllm_deepstack import ROOT


@pytest.mark.parametrize("release, geo3k", [("0.33.0", False), ("0.22.1", True)])
def test_readme(release, geo3k):
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(table(release, "geo3k_nano", geo3k)) in readme
