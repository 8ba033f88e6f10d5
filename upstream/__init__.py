"""The fork's change as a pull request to vLLM: a series for `git am`, and its text."""
