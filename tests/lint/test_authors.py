"""docs/authors.md: its model is clean, and breaks a rule with each line less; its CI files work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_deepstack import ROOT
from vllm_deepstack.__main__ import parser
from vllm_deepstack.lint.rules import RULES
from vllm_deepstack.lint.verb import lint

PAGE = (ROOT / "docs/authors.md").read_text()
(MODEL,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GITHUB, BUILDKITE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
REGISTER = 'self.register_buffer("staged", torch.zeros(rows, hidden_size), persistent=False)'
CLEAR = "self.staged.zero_()"
STAGE = "self.staged[: len(input_ids)][is_multimodal] = features"
STACK = "self.staged = torch.stack(features)"
JOBS = yaml.safe_load(GITHUB)["jobs"]
COMMANDS = [
    *(step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step),
    *(command for step in yaml.safe_load(BUILDKITE)["steps"] for command in step["command"]),
]


def codes(text: str, folder: Path) -> set[str]:
    (folder / "model.py").write_text("import torch\nfrom torch import nn\n\n" + text)
    return {finding.code for finding in lint([folder], None, list(RULES))[0]}


def test_the_model_is_clean(tmp_path):
    assert codes(MODEL, tmp_path) == set()


STEPS = """
from types import SimpleNamespace
import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsMultiModal

{model}

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_input_ids = nn.Embedding(16, 4)

    def model(self, *, inputs_embeds, staged, **inputs):
        return inputs_embeds, staged

config = SimpleNamespace(
    scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
    model_config=SimpleNamespace(get_hidden_size=lambda: 4),
)
model = MyModel(vllm_config=config)
model.language_model = Decoder()
storage = model.staged.data_ptr()
ids, image = torch.tensor([1, 2, 2, 3]), torch.tensor([False, True, True, False])
given = torch.arange(16.0).view(2, 8)
with torch.inference_mode():
    embeds = model.embed_input_ids(ids, [given], is_multimodal=image)
    read, staged = model.forward(ids, torch.arange(12).view(3, 4), inputs_embeds=embeds)
    assert read[1:3].equal(given[:, :4]) and staged[1:3].equal(given[:, 4:])
    assert staged[[0, 3]].eq(0).all()
    assert read[0].equal(model.language_model.embed_input_ids.weight[1])
    embeds = model.embed_input_ids(ids)
    _, staged = model.forward(ids, torch.arange(4), inputs_embeds=embeds)
assert staged.eq(0).all() and len(staged) == 4 and staged.data_ptr() == storage
"""


def test_the_model_works():
    """With vLLM's own interface: features are read in their step, and in no other."""
    command = [sys.executable, "-c", STEPS.format(model=MODEL)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code, changes",
    [
        (
            "DS001",
            [(REGISTER, "self.staged = None"), (CLEAR, "self.staged = None"), (STAGE, STACK)],
        ),
        ("DS002", [(f"        {CLEAR}\n", "")]),
        ("DS003", [(CLEAR, "self.staged = torch.zeros_like(self.staged)")]),
    ],
)
def test_what_the_rules_are_for(code, changes, tmp_path):
    text = MODEL
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert code in codes(text, tmp_path)


@pytest.mark.parametrize("schema, text", [("github-workflows", GITHUB), ("buildkite", BUILDKITE)])
def test_ci_takes_the_file(schema, text, tmp_path):
    """As far as its schema tells."""
    (tmp_path / "compiled.yml").write_text(text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    command += [f"vendor.{schema}", str(tmp_path / "compiled.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vllm-deepstack")])
def test_the_commands_are_ours(command):
    args, options = parser().parse_known_args(shlex.split(command)[1:])
    assert not options
    assert args.execute


def test_the_lint_step_fails_on_a_broken_model(tmp_path, unpacked):
    """As a CI runs it, in a repository of models."""
    (tmp_path / "models").mkdir()
    (command,) = {c for c in COMMANDS if c.endswith("--format github models/")}
    ours = f"PYTHONPATH={ROOT} {sys.executable} -m vllm_deepstack"
    command = command.replace("vllm-deepstack", ours).replace("../vllm", str(unpacked("0.33.0")))
    for text, code in ((MODEL, 0), (MODEL.replace(f"        {CLEAR}\n", ""), 1)):
        base = "from vllm.model_executor.models.interfaces import SupportsMultiModal\n"
        (tmp_path / "models/model.py").write_text(f"from torch import nn\n{base}{text}")
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert ("::" in done.stdout and "DS002" in done.stdout) == bool(code)
