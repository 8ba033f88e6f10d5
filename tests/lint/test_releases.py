"""The findings on vLLM's own models, as docs/lint.md judges them."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from vllm_deepstack import ROOT
from vllm_deepstack.cli import uncollected
from vllm_deepstack.lint.rules import RULES
from vllm_deepstack.lint.verb import lint
from vllm_deepstack.patch.tree import Tree

ROW = re.compile(
    r"^\| (?P<releases>[\d., ]+) \| (?P<code>DS\d+) \| `(?P<file>.+)` \| `(?P<state>.+)` "
    r"\| (?P<verdict>true|latent|false) \| .+ \|$",
    re.MULTILINE,
)
JUDGED = [row.groupdict() for row in ROW.finditer((ROOT / "docs/lint.md").read_text())]
RELEASES = ["0.22.1", "0.27.1", "0.33.0"]
# The models that the project's design names, by what was measured or read.
D1 = {
    "0.22.1": {"Qwen3VL", "Qwen3OmniMoeThinker"},
    "0.27.1": {"MossAudio"},
    "0.33.0": {"MossAudio"},
}
D2 = {
    "0.22.1": {"Granite4Vision"},
    "0.27.1": {"Qwen3VL", "Qwen3OmniMoeThinker", "Granite4Vision"},
    "0.33.0": {
        *("Qwen3VL", "Qwen3VLMoe", "Qwen3OmniMoeThinker", "CohereCompass", "Qwen4Exp"),
        "Granite4Vision",
    },
}
INNOCENT = {"Gemma3n", "Gemma4", "Qwen2VL", "Qwen2_5_VL", "Llama", "CLIP", "Siglip"}


def found(tree, version):
    """(rule, file, class and attribute), and all classes by rule."""
    with uncollected():
        findings, classes = lint([tree / "vllm"], tree, list(RULES))
    assert classes > 300, version
    places = {
        (f.code, f.file.relative_to((tree / "vllm").resolve()).as_posix(), f"{f.cls}.{f.attribute}")
        for f in findings
    }
    named: dict[str, set[str]] = {}
    for finding in findings:
        named.setdefault(finding.code, set()).update((finding.cls, *finding.also))
    return places, named


@pytest.mark.parametrize("version", RELEASES)
def test_every_finding_is_judged(unpacked, version):
    places, named = found(unpacked(version), version)
    judged = {
        (row["code"], row["file"], row["state"])
        for row in JUDGED
        if version in row["releases"].split(", ")
    }
    assert {
        (code, file.removeprefix("model_executor/"), state) for code, file, state in places
    } == judged
    for code, models in (("DS001", D1), ("DS002", D2)):
        for model in models[version]:
            assert any(
                name.startswith(f"{model}F") or name == f"{model}Model" for name in named[code]
            )
    for names in named.values():
        assert not any(name.startswith(tuple(INNOCENT)) for name in names)


def test_at_most_one_in_ten_is_false():
    assert len(JUDGED) >= 20
    assert sum(row["verdict"] == "false" for row in JUDGED) <= len(JUDGED) / 10


def test_of_the_fork_what_is_latent_is_left(unpacked, tmp_path):
    """D5 in docs/lint.md; and Qwen4-Exp, whose text-only steps do not clear: it has no checkpoints
    with levels."""
    tree = shutil.copytree(unpacked("0.33.0"), tmp_path / "tree", copy_function=os.link)
    Tree(tree).apply()
    places, _ = found(tree, "0.33.0")
    assert {(code, file.rpartition("/")[2]) for code, file, _ in places} == {
        ("DS002", "deepstack.py"),
        ("DS003", "granite4_vision.py"),
    }
