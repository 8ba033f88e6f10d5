""".buildkite/pipeline.yaml: Buildkite takes it, and what its steps name is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import yaml

from vllm_deepstack.releases import ROOT, releases

FILE = ROOT / ".buildkite/pipeline.yaml"
(GROUP,) = yaml.safe_load(FILE.read_text())["steps"]
STEPS = {step["key"]: step for step in GROUP["steps"]}
DOWNLOAD = "buildkite-agent artifact download "
every_step = pytest.mark.parametrize("key", STEPS)


@pytest.mark.parametrize("unknown", [False, True])
def test_schema(unknown, tmp_path):
    """As far as the schema tells. A key that Buildkite does not know is an error."""
    text = FILE.read_text()
    (tmp_path / FILE.name).write_text(text.replace("if_changed", "if_change") if unknown else text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.buildkite"]
    done = subprocess.run([*command, tmp_path / FILE.name], capture_output=True, text=True)
    assert done.returncode == unknown, done.stdout
    assert ("if_change" in done.stdout) == unknown


@every_step
def test_commands_are_of_the_makefile(key):
    """But for fetching what another step made."""
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    *fetching, command = STEPS[key]["commands"]
    assert all(fetch.startswith(DOWNLOAD) for fetch in fetching)
    program, *arguments = shlex.split(command)
    (target,) = [word for word in arguments if "=" not in word]
    assert program == "make" and target in phony[1].split()
    if key != "release":  # which calls make, whatever `-n` says
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)


def test_steps_wait_for_steps_before_them():
    keys = [step["key"] for step in GROUP["steps"]]
    assert len(keys) == len(STEPS)
    for n, key in enumerate(keys):
        assert set(STEPS[key].get("depends_on", ())) <= set(keys[:n])


@every_step
def test_what_is_downloaded_was_made(key):
    """By a step that this one waits for, directly or not; and it is not made again."""
    waits = list(STEPS[key].get("depends_on", ()))
    for earlier in waits:
        waits += [w for w in STEPS[earlier].get("depends_on", ()) if w not in waits]
    *fetching, command = STEPS[key]["commands"]
    assert command.endswith(" WHEEL=at-hand") == bool(fetching)
    for fetch in fetching:
        *_, pattern, _, option, step = shlex.split(fetch)
        assert option == "--step" and step in waits
        assert any(fnmatch(kept, pattern) for kept in STEPS[step]["artifact_paths"])


@every_step
def test_files_and_agents(key):
    step = STEPS[key]
    for path in step.get("if_changed", ()):
        folder = path.removesuffix("/**")
        assert (ROOT / folder).is_dir() if folder != path else (ROOT / path).is_file()
    assert step["agents"]["queue"] in {"small_cpu_queue", "cpu_queue", "h200_queue"}
    assert ("h200" in step["agents"]["queue"]) == ("H200" in step["label"])
    assert 5 <= step["timeout_in_minutes"] <= 120
    assert {retry["limit"] for retry in step["retry"]["automatic"]} == {2}


def test_everything_has_its_step():
    steps = " ".join(command for step in STEPS.values() for command in step["commands"])
    for target in ("lint", "test-unit", "test-engines", "test-gpu", "test-two-gpus", "geo3k"):
        assert f"make {target}" in steps
    for target in ("wheel VLLM_TARGET_DEVICE=cpu", "wheel VLLM_TARGET_DEVICE=cuda", "bench-gpu"):
        assert f"make {target}" in steps
    nightly = [key for key, step in STEPS.items() if "NIGHTLY" in step.get("if", "")]
    assert nightly == ["optional", "geo3k", "speed"]
    assert STEPS["two-gpus"]["agents"]["gpus"] == "2"
    assert STEPS["release"]["if"] == "build.tag != null"


def test_gpu_steps_are_of_the_default_and_the_newest_release():
    newest = f"RELEASE={max(releases())}"
    tested = [c for s in STEPS.values() for c in s["commands"] if c.startswith("make test-gpu ")]
    assert sum(newest in command for command in tested) == len(tested) / 2 == 2
    assert sum("RELEASE=" in command for command in tested) == 2
    (geo3k,) = [s for s in STEPS.values() if s["commands"][-1] == tested[0]]
    assert "TESTS=tests/geo3k" in tested[0] and "Geo3K" in geo3k["label"]
    assert newest in STEPS["gpu-plugin"]["commands"][-1]
