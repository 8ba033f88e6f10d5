"""Accuracy on Geo3K: of vLLM's engines, eager and compiled, of Transformers, of endpoints."""

INSTRUCTION = "Reason step by step. Put the final answer in \\boxed{}."
"""What is asked for beside the question."""


class Geo3kError(Exception):
    """The evaluation could not run; the message says why and what to do."""


class UnreachableError(Geo3kError):
    """The hub could not be reached."""
