"""Each rule on a model that it is about, before and after the fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import jsonschema
import pytest
import yaml

from vllm_deepstack import PROJECT, ROOT
from vllm_deepstack.__main__ import main
from vllm_deepstack.lint.rules import RULES
from vllm_deepstack.lint.verb import lint

MODEL = """
import torch
from torch import nn


class Base(nn.Module):
    def embed_input_ids(self, input_ids):
        return self.language_model.embed_input_ids(input_ids)


class {name}(Base):
    def __init__(self):
        super().__init__()
{init}

    def embed_input_ids(self, input_ids, multimodal_embeddings=None):
{embed}

    def forward(self, input_ids, inputs_embeds=None):
{forward}
"""
ALLOCATE = "self.staged = [torch.zeros(8, 4) for _ in range(3)]"
REGISTER = "self.register_buffer('staged', torch.zeros(3, 8, 4))"
STAGE = """
if multimodal_embeddings is not None:
    self.staged[0][:4].copy_(multimodal_embeddings)
return super().embed_input_ids(input_ids)
"""
CLEAR_FIRST = "for level in self.staged:\n    level.zero_()\n" + STAGE
RUN = "return self.language_model(inputs_embeds, deepstack=self.staged)"
RUN_ROWS = """
rows = [level[: inputs_embeds.size(0)] for level in self.staged]
return self.language_model(inputs_embeds, deepstack=rows)
"""
RUN_AND_CLEAR = """
out = self.language_model(inputs_embeds, deepstack=self.staged)
if self.num_staged:
    self.staged.zero_()
    self.num_staged = 0
return out
"""
# init, embed_input_ids, forward; by the rule's code, and what is right.
WRONG = {
    "DS001": (
        "self.staged = None",
        "self.staged = None\nif multimodal_embeddings is not None:\n"
        "    self.staged = torch.stack(multimodal_embeddings)\nreturn input_ids",
        RUN,
    ),
    "DS002": (REGISTER, STAGE, RUN_AND_CLEAR),
    "DS003": (
        REGISTER,
        "self.staged.zero_()\nif multimodal_embeddings is not None:\n"
        "    self.staged = self.staged.to(input_ids.device)\nreturn input_ids",
        RUN,
    ),
    "DS004": (ALLOCATE, CLEAR_FIRST, RUN),
    "DS005": (REGISTER, CLEAR_FIRST, RUN_ROWS),
    "DS006": (
        "with self._mark_tower_model(None, 'image'):\n    " + REGISTER,
        CLEAR_FIRST,
        RUN,
    ),
    "DS007": (REGISTER, CLEAR_FIRST, "if not self.num_staged:\n    self.staged.zero_()\n" + RUN),
}
RIGHT = {
    "DS001": (REGISTER, CLEAR_FIRST, RUN),
    "DS002": (REGISTER, CLEAR_FIRST, RUN_AND_CLEAR),
    "DS003": (REGISTER, CLEAR_FIRST, RUN),
    "DS004": (REGISTER, CLEAR_FIRST, RUN),
    "DS005": (REGISTER, CLEAR_FIRST, RUN),
    "DS006": (
        "with self._mark_tower_model(None, 'image'):\n"
        "    self.register_buffer('staged', torch.zeros(3, 8, 4, device='cuda'))",
        CLEAR_FIRST,
        RUN,
    ),
    "DS007": (REGISTER, CLEAR_FIRST, RUN_AND_CLEAR),
}


def write(file: Path, init: str, embed: str, forward: str, name: str = "Model") -> Path:
    bodies = {"init": init, "embed": embed, "forward": forward}
    text = {key: indent(dedent(body).strip(), " " * 8) for key, body in bodies.items()}
    file.write_text(MODEL.format(name=name, **text))
    return file


def codes(*files: Path) -> list[str]:
    found, _ = lint(list(files), None, list(RULES))
    return sorted({finding.code for finding in found})


@pytest.mark.parametrize("code", RULES)
def test_before_and_after(code, tmp_path):
    name = "MoeModel" if code == "DS005" else "Model"
    assert code in codes(write(tmp_path / "wrong.py", *WRONG[code], name=name))
    assert codes(write(tmp_path / "right.py", *RIGHT[code], name=name)) == []
    assert codes(tmp_path / "wrong.py") == [code]


def test_what_forward_always_clears_is_in_the_graph(tmp_path):
    """As up to 0.19.1: the zeroing is captured, and replayed."""
    clear = "out = self.language_model(inputs_embeds, deepstack=self.staged)\n"
    clear += "for level in self.staged:\n    level.zero_()\nreturn out"
    assert codes(write(tmp_path / "model.py", REGISTER, STAGE, clear)) == []


BASE = """
import torch


class Model:
    def __init__(self):
        self.register_buffer("staged", torch.zeros(8, 4))

    def embed_input_ids(self, input_ids, multimodal_embeddings=None):
        self._stage(multimodal_embeddings)
        return input_ids

    def _stage(self, embeddings):
        if embeddings is not None:
            self.staged[:4].copy_(embeddings)

    def _rows(self):
        return self.staged

    def forward(self, input_ids, inputs_embeds=None):
        rows = self._rows()
        kwargs = {}
        kwargs["deepstack"] = rows
        return self.language_model(inputs_embeds, **kwargs)
"""
DERIVED = """
from .base import Model


class Derived(Model):
    pass
"""


def test_through_methods_getters_and_files(tmp_path):
    """Written, read, and inherited elsewhere."""
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "derived.py").write_text(DERIVED)
    found, classes = lint([tmp_path], None, list(RULES))
    assert classes == 2
    (finding,) = found
    assert (finding.code, finding.cls, finding.also) == ("DS002", "Model", ("Derived",))
    assert (finding.writer.method.name, finding.reader.method.name) == ("_stage", "forward")
    assert codes(tmp_path / "derived.py") == ["DS002"]


def test_what_is_written_at_every_step(tmp_path):
    """Gemma 3n's per-layer embeddings: of all tokens, of every step."""
    embed = "n = len(input_ids)\nif input_ids is not None:\n    self.staged[:n].copy_(input_ids)"
    one = "self.staged = torch.zeros(8, 4)"
    assert codes(write(tmp_path / "model.py", one, embed, RUN)) == []


def test_a_model_without_staging(tmp_path):
    text = "return super().embed_input_ids(input_ids)"
    run = "return self.language_model(inputs_embeds)"
    assert codes(write(tmp_path / "model.py", ALLOCATE, text, run)) == []


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return write(tmp_path / "model.py", *WRONG["DS002"])

    def test_text(self, file, capsys):
        assert main(["lint", "model.py"]) == 1
        first, where, docs, last = capsys.readouterr().out.splitlines()
        line = file.read_text().splitlines().index("            self.staged.zero_()") + 1
        begins = f"model.py:{line}: DS002 stale-staging: Model.staged: a replayed graph does not"
        assert first.startswith(begins)
        assert "written by embed_input_ids (model.py:" in where and "read by forward" in where
        assert docs.strip() == f"{PROJECT}/blob/main/docs/lint.md#ds002"
        assert last == "1 finding in 1 classes that embed and run"

    def test_json(self, file, capsys):
        assert main(["lint", "model.py", "--format", "json"]) == 1
        told = json.loads(capsys.readouterr().out)
        jsonschema.validate(told, json.loads((ROOT / "docs/schemas/lint.json").read_text()))
        assert [finding["code"] for finding in told["findings"]] == ["DS002"]

    def test_sarif(self, file, capsys):
        assert main(["lint", "model.py", "--format", "sarif"]) == 1
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        assert {rule["id"] for rule in run["tool"]["driver"]["rules"]} == set(RULES)
        (result,) = run["results"]
        place = result["locations"][0]["physicalLocation"]
        assert (result["ruleId"], place["artifactLocation"]["uri"]) == ("DS002", "model.py")

    def test_github(self, file, capsys):
        assert main(["lint", "model.py", "--format", "github"]) == 1
        assert capsys.readouterr().out.startswith("::error file=model.py,line=")

    def test_select(self, file, capsys):
        assert main(["lint", "model.py", "--select", "DS001,DS003"]) == 0
        assert main(["lint", "model.py", "--select", "DS"]) == 1
        with pytest.raises(SystemExit):
            main(["lint", "model.py", "--select", "DS9"])
        assert "no rule 'DS9'; there are DS001, " in capsys.readouterr().err

    @pytest.mark.parametrize(
        "comment, code",
        [
            ("# noqa: DS002 the step before clears it", 0),
            ("# noqa: DS001, DS002: the step before clears it", 0),
            ("# noqa: DS002", 1),
            ("# noqa: DS001 another", 1),
            ("# noqa", 1),
        ],
    )
    def test_noqa(self, file, capsys, comment, code):
        line = "            self.staged.zero_()"
        file.write_text(file.read_text().replace(line, f"{line}  {comment}"))
        assert main(["lint", "model.py"]) == code
        no_reason = "gives no reason, and is ignored" in capsys.readouterr().err
        assert no_reason == (comment == "# noqa: DS002")

    def test_nothing_found(self, tmp_path, capsys):
        file = write(tmp_path / "model.py", *RIGHT["DS002"])
        assert main(["lint", str(file)]) == 0
        assert capsys.readouterr().out == "0 findings in 1 classes that embed and run\n"

    def test_rules_by_name(self, file, capsys):
        assert main(["lint", "model.py", "--select", "none-or-tensor, wiped-before-read"]) == 0
        assert main(["lint", "model.py", "--select", "stale-staging"]) == 1
        assert "stale-staging" in capsys.readouterr().out

    @pytest.mark.parametrize("format", ["json", "sarif", "github"])
    def test_paths_begin_at_the_repository(self, tmp_path, monkeypatch, capsys, format):
        (tmp_path / "models").mkdir()
        write(tmp_path / "models/model.py", *WRONG["DS002"])
        monkeypatch.chdir(tmp_path / "models")
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        assert main(["lint", "model.py", "--format", format]) == 1
        assert "models/model.py" in capsys.readouterr().out

    def test_paths_without_git(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "models").mkdir()
        write(tmp_path / "models/model.py", *WRONG["DS002"])
        monkeypatch.chdir(tmp_path / "models")
        monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
        assert main(["lint", "model.py", "--format", "github"]) == 1
        assert "file=models/model.py,line=" in capsys.readouterr().out

    def test_links_of_sarif_are_absolute(self, file, capsys):
        assert main(["lint", "model.py", "--format", "sarif"]) == 1
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        for rule in run["tool"]["driver"]["rules"]:
            assert rule["helpUri"].startswith("https://")
            assert rule["name"] == RULES[rule["id"]].name

    def test_a_base_that_cannot_be_read(self, tmp_path, capsys):
        file = write(tmp_path / "model.py", *RIGHT["DS002"])
        text = file.read_text().replace("class Base(nn.Module)", "class Base(nn.Module, Other)")
        file.write_text("from elsewhere import Other\n" + text)
        assert main(["lint", str(file)]) == 2
        assert "Base: its base Other cannot be read" in capsys.readouterr().err

    def test_a_finding_is_more_than_a_base(self, file, capsys):
        file.write_text("from elsewhere import nn\n" + file.read_text())
        file.write_text(file.read_text().replace("from torch import nn\n", ""))
        assert main(["lint", "model.py"]) == 1
        assert "its base nn.Module cannot be read" in capsys.readouterr().err

    def test_what_was_not_asked_for_is_apart(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("base.py").write_text(BASE)
        Path("derived.py").write_text(DERIVED)
        assert main(["lint", "derived.py"]) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first == "In files that were not asked for:"
        assert second.startswith("base.py:")
        assert main(["lint", "derived.py", "base.py"]) == 1
        assert main(["lint", "derived.py", "--format", "json"]) == 0

    def test_what_a_file_makes_of_its_base_is_its_own(self, tmp_path, monkeypatch, capsys):
        """The base clears; what stages in its place does not."""
        monkeypatch.chdir(tmp_path)
        write(Path("base.py"), REGISTER, CLEAR_FIRST, RUN_AND_CLEAR)
        stage = "    def embed_input_ids(self, ids, m=None):\n        self.staged[m] = ids\n"
        Path("derived.py").write_text(DERIVED.replace("    pass\n", stage))
        assert main(["lint", "base.py"]) == 0
        assert main(["lint", "derived.py"]) == 1
        assert "not asked for" not in capsys.readouterr().out

    def test_baseline(self, file, capsys):
        assert main(["lint", "model.py", "--write-baseline", "known.json"]) == 0
        file.write_text("# One line more.\n" + file.read_text())
        assert main(["lint", "model.py", "--baseline", "known.json"]) == 0
        file.write_text(file.read_text().replace("class Model(", "class Another("))
        assert main(["lint", "model.py", "--baseline", "known.json"]) == 1
        Path("known.json").write_text("no")
        assert main(["lint", "model.py", "--baseline", "known.json"]) == 2
        assert "known.json: is no JSON" in capsys.readouterr().err

    def test_the_hook_needs_nothing_installed(self, file):
        hook = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
        command = [sys.executable, "-I", "-S", str(ROOT / hook["entry"]), "model.py"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert os.access(ROOT / hook["entry"], os.X_OK)

    def test_errors(self, tmp_path, capsys):
        assert main(["lint", str(tmp_path / "none.py")]) == 2
        assert "none.py: no such file or folder" in capsys.readouterr().err
        (tmp_path / "broken.py").write_text("class A:\n    def embed_input_ids(self)\n")
        assert main(["lint", str(tmp_path)]) == 2
        assert "broken.py: does not parse: " in capsys.readouterr().err
        assert main(["lint", str(tmp_path), "--vllm", str(tmp_path)]) == 2
        assert f"--vllm {tmp_path}: no vLLM there" in capsys.readouterr().err
