"""Speed: what serving costs with the fork, and how near its DeepStack path is to the hardware."""


class SpeedError(Exception):
    """What keeps a benchmark from running: says which value, and what to do."""
