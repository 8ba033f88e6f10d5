"""`vllm-deepstack`: fixes DeepStack models in an installed vLLM, and checks any model."""

from pathlib import Path

__version__ = "2"

# The folder that has vllm/ and requirements/: the repository, or what was installed of it.
ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "requirements").is_dir()
)
