"""Merges the fork's definitions into the vLLM release they were written for."""
