"""Merges the fork's definitions into the vLLM release they were written for."""


class OverlayError(Exception):
    """Something does not fit; the message says what, where, and what to do."""
