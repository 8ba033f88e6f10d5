"""One engine's part of the check, in a process of its own: started by `tools.parity`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engines import STAGE, make_engine, vllm_name
from .samples import Sample, with_images


def main(job: str, result: str, options: list[str]) -> None:
    print(f"{STAGE}starting the engine", flush=True)
    llm = make_engine(options)
    print(f"{STAGE}generating", flush=True)
    answer(llm, Path(job), Path(result))


def answer(llm: Any, spec: Path, result: Path) -> None:
    """Writes what the engine gives for a job's samples. The file is there when it is whole."""
    from vllm import SamplingParams

    job = json.loads(spec.read_text())
    samples = [Sample(**sample) for sample in job["samples"]]
    config = llm.llm_engine.vllm_config.model_config
    if job["builtin"] and not config.is_multimodal_model:
        samples = [Sample(s.messages, s.prompt) for s in samples]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        logprobs=-1,
        flat_logprobs=True,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = generate(llm, samples, sampling)
    arrays: dict[str, Any] = {}
    image_token = image_token_id(config.hf_config)
    for i, (sample, output) in enumerate(zip(samples, outputs)):
        arrays[f"prompt_{i}"] = np.array(output.prompt_token_ids)
        arrays[f"images_{i}"] = np.array(len(sample.images))
        arrays[f"image_tokens_{i}"] = np.array(output.prompt_token_ids.count(image_token))
        arrays[f"tokens_{i}"] = np.array(output.outputs[0].token_ids)
        arrays[f"logits_{i}"] = logits(output.outputs[0].logprobs, config.get_vocab_size())
    meta = {"vllm": vllm_name(), "dtype": str(config.dtype).removeprefix("torch.")}
    part = result.with_suffix(".part.npz")
    np.savez(part, meta=np.array(json.dumps(meta)), **arrays)
    part.replace(result)


def generate(llm: Any, samples: list[Sample], sampling: Any) -> list[Any]:
    """All samples, in flight together; those that are chats go through the chat template."""
    raw = [s.prompt is not None for s in samples]
    tokenizer = llm.get_tokenizer()
    if not any(s.images for s in samples) and getattr(tokenizer, "chat_template", None) is None:
        raw = [True] * len(samples)
    chats = [with_images(s, image_part) for s, is_raw in zip(samples, raw) if not is_raw]
    prompts = [raw_prompt(s) for s, is_raw in zip(samples, raw) if is_raw]
    done = iter(llm.chat(chats, sampling, use_tqdm=False) if chats else [])
    done_raw = iter(llm.generate(prompts, sampling, use_tqdm=False) if prompts else [])
    return [next(done_raw if is_raw else done) for is_raw in raw]


def image_part(path: str) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": open_image(path)}


def open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def raw_prompt(sample: Sample) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": sample.text()}
    if sample.images:
        prompt["multi_modal_data"] = {"image": [open_image(path) for path in sample.images]}
    return prompt


def image_token_id(config: Any) -> int | None:
    """The token that stands for a piece of an image, if the model's config says which."""
    for part in (config, getattr(config, "thinker_config", None)):
        for name in ("image_token_id", "image_token_index"):
            if (token := getattr(part, name, None)) is not None:
                return token
    return None


def logits(flat: Any, vocabulary: int) -> np.ndarray:
    """`[steps, vocabulary]` from vLLM's flat list; NaN where vLLM gave nothing."""
    steps = np.full((len(flat.start_indices), vocabulary), np.nan, np.float32)
    tokens, values = np.array(flat.token_ids), np.array(flat.logprobs, np.float32)
    for step, (start, end) in enumerate(zip(flat.start_indices, flat.end_indices)):
        steps[step, tokens[start:end]] = values[start:end]
    return steps


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
