"""The fork's change as a pull request to vLLM: a series for `git am`, and its text."""


class PullRequestError(Exception):
    """Something is missing; the message says what, and what to do."""
