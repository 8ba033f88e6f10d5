"""Steps an engine by hand, so that who is in flight with whom is the same in every run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compare import Run


class RefusedError(ValueError):
    """The engine does not take a request."""


@dataclass(frozen=True)
class Joining:
    """A request, and when it joins."""

    prompt: Callable[[], Any]
    """As `LLMEngine.add_request` takes it; made when it joins."""
    max_tokens: int
    joins_after: int
    """Steps after the request before it joined; at once where none is in flight."""
    judged: bool = True
    """Whether its logits are kept: of a large vocabulary they are 20 MB a token."""
    grammar: bool = False
    """Whether its answer follows a grammar."""
    adapter: tuple[str, str] | None = None
    """A LoRA adapter's name and folder."""


@dataclass(frozen=True)
class Served:
    """What a request got."""

    run: Run | None
    """None if it is not judged."""
    prompt: list[int]
    """Its tokens."""
    joined: int
    """The engine's steps before it."""
    ended: int


def is_pooling(llm: Any) -> bool:
    """Whether it gives embeddings, or scores, and no tokens."""
    return getattr(llm.llm_engine.vllm_config.model_config, "runner_type", "") == "pooling"


def pooling(llm: Any) -> dict[str, Any]:
    """What `LLM.encode` is given beside prompts."""
    from vllm import PoolingParams

    tasks = llm.llm_engine.get_supported_tasks()
    names = ("embed", "token_embed", "classify", "token_classify", "score")
    task = next(name for name in names if name in tasks)
    return {"pooling_params": PoolingParams(task=task), "pooling_task": task}


def sampling(max_tokens: int, judged: bool = True, grammar: bool = False) -> Any:
    """Greedy; if judged, with raw logits of the whole vocabulary, which `logits` reads."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    digits = StructuredOutputsParams(regex="[0-9]{64}") if grammar else None
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        logprobs=-1 if judged else None,
        flat_logprobs=judged,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=digits,
    )


def run_of(output: Any, vocabulary: int) -> Run:
    """What an engine gave: logits; of a pooling model what it pooled, as one step's."""
    if hasattr(output.outputs, "data"):
        return Run(np.zeros(1, np.int64), output.outputs.data.float().cpu().numpy().reshape(1, -1))
    tokens = output.outputs[0]
    return Run(np.array(tokens.token_ids), logits(tokens.logprobs, vocabulary))


def logits(flat: Any, vocabulary: int) -> np.ndarray:
    """`[steps, vocabulary]` from vLLM's flat list; NaN where vLLM gave nothing."""
    steps = np.full((len(flat.start_indices), vocabulary), np.nan, np.float32)
    tokens, values = np.array(flat.token_ids), np.array(flat.logprobs, np.float32)
    for step, (start, end) in enumerate(zip(flat.start_indices, flat.end_indices)):
        steps[step, tokens[start:end]] = values[start:end]
    return steps


def budget(llm: Any) -> int:
    """The most tokens of a step: `max_num_batched_tokens`."""
    return llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens


def flush(llm: Any, text: Callable[[int], list[int]]) -> None:
    """A step of as much text as fits, `text(tokens)`. No graph is captured for it: the model's own
    Python runs, and ends what an earlier step has staged."""
    tokens = min(budget(llm), llm.llm_engine.vllm_config.model_config.max_model_len - 1)
    prompt = {"prompt_token_ids": text(tokens)}
    step_through(llm, [Joining(lambda: prompt, 1, 0, judged=False)])


def step_through(llm: Any, requests: list[Joining]) -> list[Served | RefusedError]:
    """What each request got, or why it was refused."""
    engine = llm.llm_engine
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    waiting = list(enumerate(requests))[::-1]
    done: dict[int, Served | RefusedError] = {}
    joined: dict[int, int] = {}
    step = last = 0
    pooled = pooling(llm)["pooling_params"] if is_pooling(llm) else None
    while waiting or engine.has_unfinished_requests():
        while waiting and (
            step - last >= waiting[-1][1].joins_after or not engine.has_unfinished_requests()
        ):
            number, request = waiting.pop()
            try:
                asked = pooled or sampling(request.max_tokens, request.judged, request.grammar)
                lora = adapter(*request.adapter) if request.adapter else None
                engine.add_request(str(number), request.prompt(), asked, lora_request=lora)
            except Exception as error:  # which ones, differs from release to release
                done[number] = RefusedError(f"{type(error).__name__}: {error}")
            joined[number] = last = step
        for output in engine.step():
            if output.finished:
                number = int(output.request_id)
                run = run_of(output, vocabulary) if requests[number].judged else None
                prompt = list(output.prompt_token_ids or [])
                done[number] = Served(run, prompt, joined[number], step)
        step += 1
    return [done[number] for number in range(len(requests))]


def adapter(name: str, folder: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1 + zlib.crc32(name.encode()) % 10_000, folder)


def can_chunk(llm: Any) -> bool:
    """Whether `chunks` works: the scheduler runs in this process, and may cut prompts and media."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    scheduling = llm.llm_engine.vllm_config.scheduler_config
    cuts = scheduling.enable_chunked_prefill and not scheduling.disable_chunked_mm_input
    return hasattr(core, "scheduler") and bool(cuts)


@contextmanager
def chunks(llm: Any, tokens: int) -> Iterator[None]:
    """Steps have no more tokens of one prompt, as with `--long-prefill-token-threshold`."""
    if not tokens:
        yield
        return
    scheduling = llm.llm_engine.engine_core.engine_core.scheduler.scheduler_config
    before = scheduling.long_prefill_token_threshold
    scheduling.long_prefill_token_threshold = tokens
    try:
        yield
    finally:
        scheduling.long_prefill_token_threshold = before


@contextmanager
def replaying(llm: Any, mode: str, by: str = "graph") -> Iterator[None]:
    """An engine whose `forward` was recorded replays it, as `replay.Graphs` has it."""
    (before,) = llm.collective_rpc("replay_mode", args=(mode, by))
    try:
        yield
    finally:
        llm.collective_rpc("replay_mode", args=tuple(before))
