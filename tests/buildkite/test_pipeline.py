"""The pipeline: valid for Buildkite, and every step is a command of the Makefile."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from importlib.resources import files

import jsonschema
import pytest
import yaml

from vllm_deepstack.releases import ROOT, releases

SCHEMA = json.loads((files("buildkite_sdk") / "schema.json").read_text())
FOLDER = ROOT / ".buildkite"
STEPS = {step["key"]: step for step in yaml.safe_load((FOLDER / "steps.yaml").read_text())["steps"]}
every_step = pytest.mark.parametrize("key", STEPS)


@pytest.fixture(scope="module")
def pipeline():
    """What Buildkite is given, through the command of the first step."""
    command = ["make", "--silent", "pipeline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return yaml.safe_load(done.stdout)


def made(pipeline, key: str) -> dict:
    (group,) = pipeline["steps"]
    (step,) = [step for step in group["steps"] if step["key"] == key]
    return step


def test_schema(pipeline):
    jsonschema.validate(pipeline, SCHEMA)
    assert len(pipeline["steps"][0]["steps"]) == len(STEPS)
    jsonschema.validate(yaml.safe_load((FOLDER / "pipeline.yaml").read_text()), SCHEMA)


def test_schema_has_teeth(pipeline):
    made(pipeline, "lint")["source_file_dependencies"] = ["vllm/"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(pipeline, SCHEMA)
    del made(pipeline, "lint")["source_file_dependencies"]


@every_step
def test_commands_are_of_the_makefile(pipeline, key):
    """But for fetching what another step made."""
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    ran = []
    for command in made(pipeline, key)["commands"]:
        program, *arguments = shlex.split(command)
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert len(targets) == 1 and targets[0] in phony[1].split()
            if key != "release":  # which calls make, whatever `-n` says
                subprocess.run(
                    ["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True
                )
            ran += targets
        else:
            assert command.startswith("buildkite-agent artifact download ")
    assert len(ran) == 1


@every_step
def test_what_is_downloaded_was_made(pipeline, key):
    """By a step that this one waits for, directly or not; and it is not made again."""
    waits = list(made(pipeline, key).get("depends_on", []))
    for earlier in waits:
        waits += [w for w in made(pipeline, earlier).get("depends_on", []) if w not in waits]
    for command in made(pipeline, key)["commands"]:
        if command.startswith("buildkite-agent artifact download "):
            *_, pattern, _, option, step = shlex.split(command)
            assert option == "--step" and step in waits
            assert any(fnmatch(kept, pattern) for kept in made(pipeline, step)["artifact_paths"])
            assert made(pipeline, key)["commands"][-1].endswith(" WHEEL=at-hand")


@every_step
def test_files_and_agents(pipeline, key):
    step = made(pipeline, key)
    for path in STEPS[key].get("source_file_dependencies", ()):
        assert (ROOT / path).exists()
        assert path in step["if_changed"] or f"{path}**" in step["if_changed"]
    assert step["agents"]["queue"].endswith("_queue")
    assert 5 <= step["timeout_in_minutes"] <= 120
    assert {retry["limit"] for retry in step["retry"]["automatic"]} == {2}


def test_everything_has_its_step():
    steps = " ".join(command for step in STEPS.values() for command in step["commands"])
    for target in ("lint", "test-unit", "test-engines", "test-gpu", "test-two-gpus", "geo3k"):
        assert f"make {target}" in steps
    for target in ("wheel VLLM_TARGET_DEVICE=cpu", "wheel VLLM_TARGET_DEVICE=cuda", "bench-gpu"):
        assert f"make {target}" in steps
    assert STEPS["geo3k"]["nightly"] and STEPS["speed"]["nightly"] and STEPS["release"]["tagged"]


def test_gpu_steps_are_of_the_default_and_the_newest_release():
    newest = f"RELEASE={max(releases())}"
    tested = [c for s in STEPS.values() for c in s["commands"] if c.startswith("make test-gpu ")]
    assert sum(newest in command for command in tested) == len(tested) / 2 == 2
    assert sum("RELEASE=" in command for command in tested) == 2
    (geo3k,) = [s for s in STEPS.values() if s["commands"][-1] == tested[0]]
    assert "TESTS=tests/geo3k" in tested[0] and "Geo3K" in geo3k["label"]
    assert newest in STEPS["gpu-plugin"]["commands"][-1]


def test_unknown_key_is_an_error(monkeypatch, tmp_path):
    """Not a step that Buildkite would run in another way than is written."""
    text = (FOLDER / "steps.yaml").read_text().replace("nightly: true", "nightli: true")
    (tmp_path / "steps.yaml").write_text(text)
    (tmp_path / "pipeline.py").write_text((FOLDER / "pipeline.py").read_text())
    done = subprocess.run(
        [sys.executable, tmp_path / "pipeline.py"], capture_output=True, text=True
    )
    assert done.returncode and "nightli" in done.stderr
