"""Runs one model in two vLLM engines, eager and compiled, and compares their logits."""


class ParityError(Exception):
    """The check could not run; the message says why and what to do."""
