"""Accuracy on Geo3K: of vLLM's engines, eager and compiled, of Transformers, of endpoints."""

from vllm_deepstack.cli import UserError

INSTRUCTION = "Reason step by step. Put the final answer in \\boxed{}."
"""What is asked for beside the question."""


class UnreachableError(UserError):
    """The hub could not be reached."""
