"""Merges the fork's definitions into the vLLM release they were written for."""

import os

PLUGIN = "deepstack"
"""The name of vLLM's plugin, for `VLLM_PLUGINS`."""
STATE = ".vllm-deepstack"
"""The folder beside vllm/ in which `apply` keeps the original files."""
OFF = "DEEPSTACK_DISABLE"


def is_off() -> bool:
    """Whether the plugin is told to leave vLLM as released."""
    return os.environ.get(OFF, "").lower() in ("1", "true")
