"""Makes Buildkite's pipeline of steps.yaml, on standard output: make pipeline.

`source_file_dependencies` become `if_changed`, a `device` the queue of its agents.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from buildkite_sdk import CommandStep, GroupStep, Pipeline

STEPS = Path(__file__).with_name("steps.yaml")
# An agent that was lost, and one that was stopped for another use.
LOST = {"automatic": [{"exit_status": -1, "limit": 2}, {"signal_reason": "agent_stop", "limit": 2}]}


def command_step(step: dict[str, Any], devices: dict[str, str]) -> CommandStep:
    step = dict(step)
    agents = {"queue": devices[step.pop("device")]}
    if count := step.pop("num_devices", 1) - 1:
        agents["gpus"] = str(count + 1)
    made: dict[str, Any] = {"agents": agents, "retry": LOST}
    if sources := step.pop("source_file_dependencies", None):
        made["if_changed"] = [f"{path}**" if path.endswith("/") else path for path in sources]
    if step.pop("nightly", False):
        made["if"] = 'build.env("NIGHTLY") == "1"'
    if step.pop("tagged", False):
        made["if"] = "build.tag != null"
    made |= step
    known = {field.serialization_alias or name for name, field in CommandStep.model_fields.items()}
    if unknown := made.keys() - known:
        sys.exit(f"{STEPS}: step {step['key']}: unknown: {', '.join(sorted(unknown))}")
    return CommandStep.model_validate(made)


def pipeline() -> Pipeline:
    described = yaml.safe_load(STEPS.read_text())
    steps = [command_step(step, described["devices"]) for step in described["steps"]]
    made = Pipeline()
    made.add_step(GroupStep(group=described["group"], steps=steps))
    return made


if __name__ == "__main__":
    print(pipeline().to_yaml(sort_keys=False), end="")
