"""One engine's part of the check, in a process of its own: started by `tools.parity.run`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..engines import STAGE, make_engine, vllm_name
from .compare import Run, compare
from .modes import EAGER, MODES
from .probes import (
    LONGEST,
    Alone,
    Prompts,
    joining,
    media_in_pieces,
    media_then_text,
    placeholder,
)
from .samples import Sample, with_images
from .stepping import can_chunk, logits, sampling, step_through

Arrays = dict[str, Any]
GETTER = "_get_deepstack_input_embeds"


def main(job: str, result: str, name: str, options: list[str]) -> None:
    mode = next(mode for mode in [EAGER, *MODES] if mode.name == name)
    if missing := mode.missing(vllm_name().partition(" ")[0], on_gpu()):
        save(Path(result), {"missing": missing}, {})
        return
    print(f"{STAGE}starting the engine", flush=True)
    answer(make_engine(options), Path(job), Path(result), eager=mode == EAGER)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def answer(llm: Any, spec: Path, result: Path, eager: bool = False) -> None:
    """Writes what the engine gives for a job. The file is there when it is whole."""
    job = json.loads(spec.read_text())
    config = llm.llm_engine.vllm_config.model_config
    meta = {
        "vllm": vllm_name(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "gpu": on_gpu(),
    }
    arrays: Arrays = {}
    alone = None
    if job["probes"]:
        print(f"{STAGE}asking short requests alone", flush=True)
        alone = Alone(llm, Prompts(llm), flush=on_gpu() and not eager)
        alone.ask(probe for probe in media_then_text() if probe.medium is None)
    print(f"{STAGE}generating", flush=True)
    samples = [Sample(**sample) for sample in job["samples"]]
    if job["builtin"] and placeholder(config)[0] != "image":
        samples = [Sample(s.messages, s.prompt) for s in samples]
    arrays |= answers(llm, samples, job["max_tokens"])
    if alone:
        meta["leaks"] = leaks(alone)
        for number, (probe, served) in enumerate(alone.found.items()):
            arrays[f"alone_{number}"] = np.array(repr(probe))
            arrays[f"alone_tokens_{number}"] = served.run.tokens
            arrays[f"alone_logits_{number}"] = served.run.logits
        if eager:
            meta["shares"] = shares(alone, samples, arrays)
    save(result, meta, arrays)


def save(result: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    part = result.with_suffix(".part.npz")
    np.savez(part, meta=np.array(json.dumps(meta)), **arrays)
    part.replace(result)


def answers(llm: Any, samples: list[Sample], max_tokens: int, opened: Any = None) -> Arrays:
    config = llm.llm_engine.vllm_config.model_config
    image_token = image_token_id(config.hf_config)
    arrays: Arrays = {}
    for i, output in enumerate(generate(llm, samples, max_tokens, opened or open_image)):
        arrays[f"prompt_{i}"] = np.array(output.prompt_token_ids)
        arrays[f"images_{i}"] = np.array(len(samples[i].images))
        arrays[f"image_tokens_{i}"] = np.array(output.prompt_token_ids.count(image_token))
        arrays[f"tokens_{i}"] = np.array(output.outputs[0].token_ids)
        arrays[f"logits_{i}"] = logits(output.outputs[0].logprobs, config.get_vocab_size())
    return arrays


def generate(llm: Any, samples: list[Sample], max_tokens: int, opened: Any) -> list[Any]:
    """All samples, in flight together; those that are chats go through the chat template."""
    raw = [s.prompt is not None for s in samples]
    tokenizer = llm.get_tokenizer()
    if not any(s.images for s in samples) and getattr(tokenizer, "chat_template", None) is None:
        raw = [True] * len(samples)

    def part(path: str) -> dict[str, Any]:
        return {"type": "image_pil", "image_pil": opened(path)}

    chats = [with_images(s, part) for s, is_raw in zip(samples, raw) if not is_raw]
    prompts = [raw_prompt(s, opened) for s, is_raw in zip(samples, raw) if is_raw]
    how = {"sampling_params": sampling(max_tokens), "use_tqdm": False}
    done = iter(llm.chat(chats, **how) if chats else [])
    done_raw = iter(llm.generate(prompts, **how) if prompts else [])
    return [next(done_raw if is_raw else done) for is_raw in raw]


def open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_blank(path: str) -> Image.Image:
    return Image.new("RGB", open_image(path).size, "gray")


def raw_prompt(sample: Sample, opened: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": sample.text()}
    if sample.images:
        prompt["multi_modal_data"] = {"image": [opened(path) for path in sample.images]}
    return prompt


def image_token_id(config: Any) -> int | None:
    """The token that stands for a piece of an image, if the model's config says which."""
    for part in (config, getattr(config, "thinker_config", None)):
        for name in ("image_token_id", "image_token_index"):
            if (token := getattr(part, name, None)) is not None:
                return token
    return None


def leaks(alone: Alone) -> dict[str, Any]:
    """`streams` that were served, with their requests; and those `not_run`, with the reason."""
    modality, config = alone.prompts.modality, alone.llm.llm_engine.vllm_config
    if not modality:
        return {"streams": {}, "not_run": {"requests after media": "it takes no images or audio"}}
    print(f"{STAGE}looking for leaks", flush=True)
    together = f"{modality}, then text"
    trickling = f"{modality} beside text, a token a step"
    found: dict[str, Any] = {"streams": {}, "not_run": {}}
    try:
        alone.ask(media_then_text())
    except ValueError as error:
        found["not_run"] = {together: f"refused: {error}"}
        return found
    longest = max(len(s.prompt) for probe, s in alone.found.items() if probe.medium is not None)
    captured = max(config.compilation_config.cudagraph_capture_sizes or [0])
    fits = captured if can_chunk(alone.llm) and captured < longest else 0
    found["streams"][together] = alone.in_stream(media_then_text(), fits)
    if not on_gpu():
        found["not_run"][trickling] = "needs CUDA graphs, and so a GPU"
    elif not can_chunk(alone.llm):
        found["not_run"][trickling] = "needs chunked prefill, and VLLM_ENABLE_V1_MULTIPROCESSING=0"
    elif longest > LONGEST:
        found["not_run"][trickling] = f"an {modality} takes {longest} tokens"
    else:
        try:
            found["streams"][trickling] = alone.in_stream(media_in_pieces(longest), 1)
        except ValueError as error:
            found["not_run"][trickling] = f"refused: {error}"
    return found


def shares(alone: Alone, samples: list[Sample], arrays: Arrays) -> dict[str, Any]:
    """How far the first token's logits move without the media, and without DeepStack's levels;
    None where that cannot be said."""
    llm, modality = alone.llm, alone.prompts.modality
    seen = [i for i, sample in enumerate(samples) if sample.images]
    found: dict[str, Any] = {"modality": modality, "blank": None, "levels": None}
    if not seen and not modality:
        return found
    print(f"{STAGE}generating without the {modality or 'image'}s", flush=True)

    def largest(opened: Any, prompts: Prompts) -> float:
        llm.reset_prefix_cache()
        moved = []
        if seen:
            chosen = [samples[i] for i in seen]
            given = answers(llm, chosen, 1, opened)
            for at, i in enumerate(seen):
                moved.append(apart(given[f"logits_{at}"], arrays[f"logits_{i}"]))
        for probe, served in alone.found.items():
            if probe.medium is not None and not seen:
                (other,) = step_through(llm, [joining(replace(probe, max_tokens=1), prompts)])
                if isinstance(other, ValueError):
                    raise other
                moved.append(apart(other.run.logits, served.run.logits))
        return max(moved)

    found["blank"] = largest(open_blank, Prompts(llm, blank=True))
    if any(llm.apply_model(without_levels)):
        found["levels"] = largest(open_image, alone.prompts)
        llm.apply_model(with_levels)
    return found


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of first tokens."""
    return compare(*(Run(np.zeros(1, np.int64), each[:1]) for each in (ours, theirs))).first


def without_levels(model: Any) -> int:
    """Has zeros in place of the DeepStack levels that a model gives its decoder; on an eager
    engine, which asks for them at each step. Returns how many modules give any."""
    modules = [m for m in model.modules() if hasattr(m, GETTER)]
    for module in modules:
        module.__dict__[GETTER] = partial(zeros, getattr(module, GETTER))
    return len(modules)


def zeros(getter: Any, *given: Any, **named: Any) -> Any:
    levels = getter(*given, **named)
    if hasattr(levels, "tensors"):
        levels = type(levels)({name: 0 * level for name, level in levels.tensors.items()})
    return levels


def with_levels(model: Any) -> None:
    for module in model.modules():
        module.__dict__.pop(GETTER, None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
