"""One engine in a process of its own, timed by step: started by `benchmarks.speed.serving`."""

from __future__ import annotations

import gc
import sys
import time
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tools.parity.engine import make_engine, vllm_name

from .models import IMAGE
from .workers import serve

WARM_STEPS = 8
"""Steps that are not timed at either end of a batch: those in which not all requests decode."""


class Engine:
    def start(self, options: list[str]) -> dict[str, Any]:
        self.llm = make_engine(options)
        gc.collect()
        gc.freeze()  # as the engine's own process does
        config = self.llm.llm_engine.vllm_config
        return {
            "vllm": vllm_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        }

    def decode(self, batch: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Seconds of each step in which `batch` requests decode a token each."""
        random = np.random.default_rng(seed)
        prompts = random.integers(20, 200, (batch, prompt_tokens)).tolist()
        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        seconds = self.run(requests, steps + 2 * WARM_STEPS)
        return seconds[-steps - WARM_STEPS : -WARM_STEPS]

    def prefill(self, requests: int, images: int, side: int, seed: int) -> dict[str, float]:
        """Of requests that arrive together, each of `images` images of `side` pixels a side.

        With the same seed, images are those of an earlier call: they have been processed,
        and the vision encoder runs again.
        """
        self.llm.llm_engine.reset_encoder_cache()
        seconds = self.run(with_images(requests, images, side, seed), 1)
        return {
            "seconds": sum(seconds),
            "steps": len(seconds),
            "prompt_tokens": self.prompt_tokens,
        }

    def run(self, requests: list[Any], max_tokens: int) -> list[float]:
        """Seconds of each of the engine's steps, from all requests' arrival to their last token."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.llm.enqueue(requests, sampling, use_tqdm=False)
        engine, seconds, self.prompt_tokens = self.llm.llm_engine, [], 0
        last = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                self.prompt_tokens += len(output.prompt_token_ids) if output.finished else 0
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        return seconds


@cache
def with_images(requests: int, images: int, side: int, seed: int) -> list[dict[str, Any]]:
    """Requests with noise for images."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(requests):
        pixels = random.integers(0, 256, (images, side, side, 3), np.uint8)
        pictures = [Image.fromarray(image) for image in pixels]
        text = IMAGE * images + "what do these images show"
        made.append({"prompt": text, "multi_modal_data": {"image": pictures}})
    return made


if __name__ == "__main__":
    serve(sys.argv[1], Engine())
