"""Transformers' run, in a process of its own: started by `benchmarks.geo3k`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor

from vllm_deepstack.check.engine import open_image
from vllm_deepstack.check.processes import STAGE
from vllm_deepstack.check.reference import load

from .answers import Answers, Asked

BATCH = 16


def main(job: str, result: str, path: str, dtype: str) -> None:
    spec = json.loads(Path(job).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{STAGE}loading", flush=True)
    started = time.monotonic()
    model = load(path, dtype if dtype == "auto" else getattr(torch, dtype)).to(device).eval()
    processor = AutoProcessor.from_pretrained(path)
    startup = time.monotonic() - started
    print(f"{STAGE}answering", flush=True)
    answers = Answers(Path(result).with_suffix(".jsonl"))
    left = answers.left([Asked(**question) for question in spec["questions"]])
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        chats = [[{"role": "user", "content": [part(p) for p in one.content]}] for one in batch]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=spec["max_tokens"], do_sample=False)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers.add([outcome(model, processor, one, row) for one, row in zip(batch, rows)])
    meta = {
        "software": f"Transformers {transformers.__version__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "startup_seconds": startup,
    }
    Path(result).write_text(json.dumps(meta))


def part(content: dict[str, Any]) -> dict[str, Any]:
    if content["type"] == "image":
        return {"type": "image", "image": open_image(content["path"])}
    return content


def outcome(
    model: Any, processor: Any, asked: Asked, row: list[int]
) -> tuple[Asked, str, str, int]:
    """Tokens after the end are padding, and do not count."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(row) if token in ends), None)
    kept = row if stop is None else row[: stop + 1]
    text = processor.decode(kept, skip_special_tokens=True)
    return asked, text, "length" if stop is None else "stop", len(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
