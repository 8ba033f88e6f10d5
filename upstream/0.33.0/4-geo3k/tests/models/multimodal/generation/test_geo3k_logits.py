"""Compiled Qwen3-VL must see in Geo3K's figures what eager Qwen3-VL sees.

A compiled decoder that drops the DeepStack features of images still answers fluently,
and text-only prompts do not show it: https://github.com/vllm-project/vllm/pull/43617
"""

import pytest
import torch
from datasets import load_dataset

from vllm import SamplingParams

models = ["Qwen/Qwen3-VL-2B-Instruct"]
datasets = ["hiyouga/geometry3k"]
GEO3K_REVISION = "fd21e533e1e50d0662a2bf7b223e60511bd5f8b7"
NUM_SAMPLES = 8

IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

# The raw logits of the whole vocabulary.
SAMPLING_PARAMS = SamplingParams(
    temperature=0,
    max_tokens=8,
    logprobs=-1,
    flat_logprobs=True,
    ignore_eos=True,
    detokenize=False,
)


def load_prompts(dataset: str) -> list[tuple[str, list | None]]:
    """A text-only prompt, and those with images."""
    rows = load_dataset(dataset, split=f"test[:{NUM_SAMPLES}]", revision=GEO3K_REVISION)
    text = rows[0]["problem"].replace("<image>", "")
    prompts: list[tuple[str, list | None]] = [(PROMPT.format(text), None)]
    for row in rows:
        problem = row["problem"].replace("<image>", IMAGE_PLACEHOLDER)
        images = [image.convert("RGB") for image in row["images"]]
        prompts.append((PROMPT.format(problem), images))
    return prompts


def generate(
    vllm_runner, model: str, dtype: str, prompts, enforce_eager: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The greedy tokens and the logits `[steps, vocabulary]` of each prompt."""
    outputs = []
    with vllm_runner(
        model,
        dtype=dtype,
        max_model_len=4096,
        max_num_seqs=4,
        enforce_eager=enforce_eager,
        limit_mm_per_prompt={"image": 1, "video": 0},
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    ) as vllm_model:
        # One at a time, so that the batches of both engines are the same.
        for prompt, images in prompts:
            ((token_ids, _, flat),) = vllm_model.generate_w_logprobs(
                [prompt], SAMPLING_PARAMS, images=[images]
            )
            # vLLM sorts them by rank; sort them by token.
            ids = torch.tensor(flat.token_ids).view(len(token_ids), -1)
            values = torch.tensor(flat.logprobs).view_as(ids)
            logits = torch.full((len(ids), int(ids.max()) + 1), torch.nan)
            outputs.append((torch.tensor(token_ids), logits.scatter_(1, ids, values)))
    return outputs


def compare(compiled, eager) -> tuple[float, float]:
    """The largest difference of two prompts' logits, and its tolerance."""
    (token_ids, logits), (expected_ids, expected) = compiled, eager
    # Up to the first token that differs, both have the same context.
    agreed = int((token_ids == expected_ids).cumprod(0).sum())
    logits, expected = logits[: agreed + 1], expected[: agreed + 1]
    # A few steps of bfloat16 at the largest logit.
    tolerance = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    return (logits - expected).abs().max().item(), tolerance


@pytest.mark.core_model
@pytest.mark.parametrize("model", models)
@pytest.mark.parametrize("dataset", datasets)
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_compiled_logits_match_eager(
    vllm_runner, model: str, dataset: str, dtype: str
) -> None:
    prompts = load_prompts(dataset)
    eager = generate(vllm_runner, model, dtype, prompts, enforce_eager=True)
    compiled = generate(vllm_runner, model, dtype, prompts, enforce_eager=False)
    text, *images = map(compare, compiled, eager)

    def is_close(result: tuple[float, float]) -> bool:
        difference, tolerance = result
        return difference <= tolerance

    assert is_close(text), f"Compiled and eager differ without images: {text}"
    assert all(map(is_close, images)), f"With images: {images}; without: {text}"
