"""`vllm-deepstack`: fixes DeepStack models in an installed vLLM, and checks any model."""

import os
from pathlib import Path

__version__ = "2"

# The folder that has vllm/ and requirements/: the repository, or what was installed of it.
ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "requirements").is_dir()
)
PLUGIN = "deepstack"
"""The name of vLLM's plugin, for `VLLM_PLUGINS`."""
STATE = ".vllm-deepstack"
"""The folder beside vllm/ in which `apply` keeps the original files."""
OFF = "DEEPSTACK_DISABLE"
"""Leaves vLLM as it is installed."""
PROJECT = "https://github.com/OWNER/REPOSITORY"
"""Where the docs are."""
REQUIRE = "DEEPSTACK_REQUIRE"
"""A model that is built without the fixes is an error."""


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def is_off() -> bool:
    """Whether the plugin is told to leave vLLM as it is installed."""
    return is_on(OFF)
