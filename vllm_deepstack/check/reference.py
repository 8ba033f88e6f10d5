"""Transformers' part of the check, in a process of its own: started by `vllm_deepstack.check`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from .engine import open_image
from .processes import STAGE
from .samples import Sample, with_images


def main(job: str, result: str, model_path: str, dtype: str) -> None:
    spec = json.loads(Path(job).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{STAGE}loading", flush=True)
    model = load(model_path, getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id = None  # as many tokens as asked for
    try:
        processor = AutoProcessor.from_pretrained(model_path)
    except (OSError, ValueError):
        processor = AutoTokenizer.from_pretrained(model_path)
    arrays: dict[str, Any] = {}
    for i, sample in enumerate(Sample(**sample) for sample in spec["samples"]):
        print(f"{STAGE}sample {i + 1} of {len(spec['samples'])}", flush=True)
        inputs = tokenize(processor, sample, spec["chat"]).to(device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=spec["max_tokens"],
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        prompt = inputs["input_ids"][0]
        arrays[f"prompt_{i}"] = prompt.cpu().numpy()
        arrays[f"tokens_{i}"] = output.sequences[0, len(prompt) :].cpu().numpy()
        arrays[f"logits_{i}"] = torch.cat(output.logits).float().cpu().numpy()
    meta = json.dumps({"transformers": transformers.__version__, "dtype": dtype})
    np.savez(result, meta=np.array(meta), **arrays)


def load(path: str, dtype: torch.dtype | str) -> Any:
    """The model with a head for text; of a Qwen3-Omni checkpoint, the thinker."""
    config = AutoConfig.from_pretrained(path)
    if config.model_type == "qwen3_omni_moe":
        auto = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    elif hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    else:
        auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype)


def tokenize(processor: Any, sample: Sample, chat: dict[str, Any]) -> Any:
    """`chat`: what `LLM.chat` was given."""
    template = chat.get("chat_template") or getattr(processor, "chat_template", None)
    no_template = not sample.images and template is None
    if sample.prompt is not None or no_template:
        images = [open_image(path) for path in sample.images]
        given = {"text": [sample.text()]} | ({"images": images} if images else {})
        return processor(**given, return_tensors="pt")
    messages = with_images(sample, lambda path: {"type": "image", "image": open_image(path)})
    return processor.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **(chat.get("chat_template_kwargs") or {}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
