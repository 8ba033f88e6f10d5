"""Answers the samples as an engine does, and fails after that."""

import sys
from pathlib import Path

import numpy as np

from vllm_deepstack.check.engine import save

if __name__ == "__main__":
    arrays = {"prompt_0": np.array([1]), "tokens_0": np.array([2]), "logits_0": np.ones((1, 3))}
    save(Path(sys.argv[2]), {"vllm": "0.33.0", "dtype": "bfloat16"}, arrays)
    raise AssertionError("too many rows")
