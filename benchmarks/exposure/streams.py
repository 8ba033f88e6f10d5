"""The streams of tests/serving/test_gpu_leaks.py, as traffic: each request against the same one on
another engine."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.serving.streams import Picture
from tests.serving.streams import Request as Sent
from tests.serving.test_gpu_leaks import streams
from vllm_deepstack.check.stepping import Joining

STREAMS = {name.replace(" ", "-"): name for name in streams(then_text=True)}


def sent(name: str, omni: bool) -> list[Sent]:
    """A prompt that ends in a placeholder ends an Omni engine as released (D12)."""
    return streams(then_text=omni)[STREAMS[name]][0]


def chunk(name: str) -> int:
    """The most tokens of a prompt in a step; 0: as the engine has it."""
    return streams(then_text=True)[STREAMS[name]][1] if name in STREAMS else 0


def has_image(request: Sent) -> bool:
    return any(isinstance(part, Picture) for part in request.parts)


def joining(name: str, omni: bool, tokenizer: Any) -> list[Joining]:
    return [
        Joining(partial(r.prompt, tokenizer), r.max_tokens, r.joins_after) for r in sent(name, omni)
    ]
