"""DeepStack features of one request must not reach the tokens of another.

A model stages them in persistent buffers, from which its CUDA graphs read. Replaying
a graph runs no Python code of `forward`, so clearing the buffers cannot be left to it.
"""

import pytest
import torch
from PIL import Image

from vllm import SamplingParams
from vllm.platforms import current_platform

models = ["Qwen/Qwen3-VL-2B-Instruct"]

# Every step fits into a captured size.
MAX_NUM_BATCHED_TOKENS = 128
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]

TEXT = "The angles of a triangle add up to 180 degrees, and those of a square to"
IMAGE = Image.radial_gradient("L").convert("RGB")
IMAGE_START = "<|vision_start|><|image_pad|>"


def answer_text(vllm_model) -> torch.Tensor:
    """The top logprobs of each token that follows a text-only prompt."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
    ((_, _, steps),) = vllm_model.generate_w_logprobs([TEXT], params)
    return torch.tensor([[entry.logprob for entry in s.values()] for s in steps])


def prefill_image(vllm_model, prompt: str | list[int]) -> list[int]:
    """Serve a prompt with an image; return the tokens it was expanded to."""
    ((token_ids, _),) = vllm_model.generate_greedy([prompt], 1, images=[[IMAGE]])
    return token_ids[:-1]


@pytest.mark.core_model
@pytest.mark.skipif(not current_platform.is_cuda(), reason="Requires CUDA graphs")
@pytest.mark.parametrize("model", models)
@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("breakable_cudagraph", [False, True])
def test_text_after_image(
    vllm_runner, monkeypatch, model: str, dtype: str, breakable_cudagraph: bool
) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(breakable_cudagraph)))

    with vllm_runner(
        model,
        dtype=dtype,
        max_num_seqs=4,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1, "video": 0},
        compilation_config={"cudagraph_capture_sizes": CAPTURE_SIZES},
    ) as vllm_model:

        def check_text(what: str) -> None:
            # Equal, not close: the same request runs alone, in the same steps.
            torch.testing.assert_close(
                answer_text(vllm_model),
                expected,
                rtol=0,
                atol=0,
                msg=lambda msg: f"Text after {what} got other logprobs.\n{msg}",
            )

        # Nothing has been staged yet.
        expected = answer_text(vllm_model)
        check_text("text")

        # With breakable CUDA graphs, its prefill replays a graph.
        token_ids = prefill_image(vllm_model, f"{IMAGE_START}<|vision_end|>{TEXT}")
        check_text("an image")

        # Alone in its step, the last token of an image makes a uniform decode batch,
        # for which vLLM replays a full CUDA graph by default.
        tokenizer = vllm_model.llm.get_tokenizer()
        image_start = tokenizer.encode(IMAGE_START, add_special_tokens=False)
        num_image_tokens = token_ids.count(image_start[-1])
        num_text_tokens = -num_image_tokens % MAX_NUM_BATCHED_TOKENS
        text = tokenizer.encode(TEXT) * num_text_tokens
        token_ids = prefill_image(vllm_model, text[:num_text_tokens] + image_start)
        assert token_ids[-1] == image_start[-1]
        assert len(token_ids) % MAX_NUM_BATCHED_TOKENS == 1
        check_text("an image token alone in its step")
