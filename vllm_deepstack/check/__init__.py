"""Runs one model in two vLLM engines, eager and compiled, and compares their logits."""

FORMAT = (
    'a sample is a JSON object with "prompt" (a string, placeholders included) or "messages" '
    '(a chat), and "images" (a list of paths, relative to the file)'
)
