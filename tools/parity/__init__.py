"""Runs one model in two vLLM engines, eager and compiled, and compares their logits."""
