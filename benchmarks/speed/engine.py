"""One engine in a process of its own, timed by step: started by `benchmarks.speed.serving`."""

from __future__ import annotations

import gc
import sys
import time
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from vllm_deepstack.check.processes import make_engine, vllm_name

from .models import IMAGE
from .workers import serve

WARM_STEPS = 8
"""Steps after requests arrive until all of them decode, each a token."""
SETTLING_STEPS = 3
"""Steps after a pause that are not timed: the one that was in flight is done meanwhile."""


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
            # Not told by workers that are processes of their own, as CPUs have.
            "compilation_seconds": config.compilation_config.compilation_time or None,
        }

    def admit(self, batch: int, prompt_tokens: int, turns: int, steps: int, seed: int) -> None:
        """Lets `batch` requests in, which decode for as long as so many turns take."""
        random = np.random.default_rng(seed)
        prompts = random.integers(20, 200, (batch, prompt_tokens)).tolist()
        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        self.enqueue(requests, 2 * WARM_STEPS + turns * (SETTLING_STEPS + steps))
        for _ in range(WARM_STEPS):
            self.llm.llm_engine.step()

    def decode(self, steps: int) -> float:
        """Seconds of a step in which each request decodes a token, the median."""
        seconds = []
        for _ in range(SETTLING_STEPS + steps):
            began = time.perf_counter()
            self.llm.llm_engine.step()
            seconds.append(time.perf_counter() - began)
        return float(np.median(seconds[SETTLING_STEPS:]))

    def finish(self) -> dict[str, float]:
        """Steps until no request is left."""
        engine, steps, prompt_tokens = self.llm.llm_engine, 0, 0
        began = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                prompt_tokens += len(output.prompt_token_ids) if output.finished else 0
            steps += 1
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "steps": steps, "prompt_tokens": prompt_tokens}

    def prefill(self, requests: int, images: int, side: int, seed: int) -> dict[str, float]:
        """Of requests that arrive together, each of `images` images of `side` pixels a side.

        With the same seed, images are those of an earlier call: they have been processed,
        and the vision encoder runs again.
        """
        self.llm.llm_engine.reset_encoder_cache()
        self.enqueue(with_images(requests, images, side, seed), 1)
        return self.finish()

    def enqueue(self, requests: list[Any], max_tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.llm.enqueue(requests, sampling, use_tqdm=False)


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
