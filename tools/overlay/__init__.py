"""Merges the fork's definitions into the vLLM release they were written for."""

__version__ = "2"

# The console script of the distribution, or the module in the repository.
PROGRAM = "python -m tools.overlay" if __name__.startswith("tools") else "vllm-deepstack"
