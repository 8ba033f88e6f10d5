"""Which released sizes get breakable graphs from VLLM_BATCH_INVARIANT=1, by GPU family.

Asks the method that decides it, of the vLLM that is imported, while that is told that it is on a
GPU of some capability. It needs no GPU, and of a release (0.31.0 or later) its Python files alone.

    PYTHONPATH=build/sdist/vllm-0.33.0 python -m benchmarks.exposure.shapes [OUT.json]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers

from benchmarks.speed import page
from vllm_deepstack import cli
from vllm_deepstack.check.processes import vllm_name

PARALLEL = (1, 2, 4, 8)
GPUS = {"Ampere": (8, 0), "Ada": (8, 9), "Hopper": (9, 0), "Blackwell": (10, 0), "sm120": (12, 0)}
NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# As in config.json of huggingface.co/Qwen/NAME-Instruct, whose heads all have 128 features.
SIZES = {
    "Qwen3-VL-2B": ("Qwen3VL", 2048, 6144, 16, 8),
    "Qwen3-VL-4B": ("Qwen3VL", 2560, 9728, 32, 8),
    "Qwen3-VL-8B": ("Qwen3VL", 4096, 12288, 32, 8),
    "Qwen3-VL-32B": ("Qwen3VL", 5120, 25600, 64, 8),
    "Qwen3-VL-30B-A3B": ("Qwen3VLMoe", 2048, 6144, 32, 4),
    "Qwen3-VL-235B-A22B": ("Qwen3VLMoe", 4096, 12288, 64, 4),
    "Qwen3-Omni-30B-A3B": ("Qwen3OmniMoe", 2048, 768, 32, 4),
}


def model_config(family: str, *shape: int) -> Any:
    """vLLM's own, of a checkpoint that is a configuration alone, of two layers."""
    from vllm.config import ModelConfig

    text = dict(zip(NAMES, shape)) | {"head_dim": 128, "num_hidden_layers": 2}
    parts: dict[str, Any] = {"text_config": text}
    if "Omni" in family:
        parts = {"thinker_config": parts}
    config = getattr(transformers, f"{family}Config")(**parts)
    config.architectures = [f"{family}ForConditionalGeneration"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16")


def sizes(model: Any, which: tuple[int, int]) -> list[int]:
    """Those of tensor parallel with which vLLM switches breakable graphs on."""
    from vllm import platforms
    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability

    found = []
    gpu = mock.Mock(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(*which))
    with mock.patch.object(platforms, "current_platform", gpu):
        for size in PARALLEL:
            parallel = SimpleNamespace(tensor_parallel_size=size)
            config = SimpleNamespace(model_config=model, parallel_config=parallel)
            if VllmConfig._uses_breakable_cudagraph_for_batch_invariance(config):
                found.append(size)
    return found


def main(out: str = "") -> None:
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    rows: list[dict[str, Any]] = []
    for name, (family, *shape) in SIZES.items():
        model = model_config(family, *shape)
        rows.append({"model": name} | {gpu: sizes(model, which) for gpu, which in GPUS.items()})
    text = [[", ".join(map(str, row[g])) or "–" for g in GPUS] for row in rows]
    print(f"vLLM {vllm_name()}: tensor parallel sizes that get breakable graphs\n")
    print(page.table(["", *GPUS], [[row["model"], *line] for row, line in zip(rows, text)]))
    if out:
        cli.write_json({"benchmark": "shapes", "vllm": vllm_name(), "rows": rows}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
