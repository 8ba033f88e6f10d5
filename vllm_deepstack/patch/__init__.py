"""A vLLM on disk: what its files have, the patch applied to them, and taken out again."""
