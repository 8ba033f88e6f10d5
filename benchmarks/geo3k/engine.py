"""One vLLM engine's run, in a process of its own: started by `benchmarks.geo3k`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_deepstack.check.engine import open_image
from vllm_deepstack.check.processes import STAGE, make_engine, vllm_name

from .answers import Answers, Asked

BATCH = 128
"""Questions after which answers are written: what an interruption costs at most."""


def main(job: str, result: str, options: list[str]) -> None:
    from vllm import SamplingParams

    spec = json.loads(Path(job).read_text())
    print(f"{STAGE}starting the engine", flush=True)
    started = time.monotonic()
    llm = make_engine(options)
    startup = time.monotonic() - started
    print(f"{STAGE}answering", flush=True)
    sampling = SamplingParams(temperature=0, max_tokens=spec["max_tokens"])
    answers = Answers(Path(result).with_suffix(".jsonl"))
    left = answers.left([Asked(**question) for question in spec["questions"]])
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        chats = [[{"role": "user", "content": [part(p) for p in one.content]}] for one in batch]
        outputs = [output.outputs[0] for output in llm.chat(chats, sampling, use_tqdm=False)]
        answers.add(
            [
                (one, output.text, str(output.finish_reason), len(output.token_ids))
                for one, output in zip(batch, outputs)
            ]
        )
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
    meta = {"software": f"vLLM {vllm_name()}", "dtype": dtype, "startup_seconds": startup}
    Path(result).write_text(json.dumps(meta))


def part(content: dict[str, Any]) -> dict[str, Any]:
    if content["type"] == "image":
        return {"type": "image_pil", "image_pil": open_image(content["path"])}
    return content


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
