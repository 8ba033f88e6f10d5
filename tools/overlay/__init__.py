"""Merges the fork's definitions into the vLLM release they were written for."""

PLUGIN = "deepstack"
"""The name of vLLM's plugin, for `VLLM_PLUGINS`."""
