"""Reads vLLM models' code for state that goes wrong when `forward` is compiled or captured."""
