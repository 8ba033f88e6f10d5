"""The streams of tests/serving/test_gpu_leaks.py, as traffic: each request against the same one on
another engine."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.serving.streams import Picture
from tests.serving.streams import Request as Sent
from tests.serving.test_gpu_leaks import (
    CHUNK,
    image_ends_prompt,
    image_trickles,
    images_then_texts,
)
from tools.parity.stepping import Joining

# And the most tokens of a prompt in a step.
STREAMS = {
    "images-then-texts": (lambda end: images_then_texts(), 0),
    "image-ends-prompt": (image_ends_prompt, CHUNK),
    "image-trickles": (image_trickles, 1),
}


def sent(name: str, omni: bool) -> list[Sent]:
    """A prompt that ends in a placeholder ends an Omni engine as released (D12)."""
    make, _ = STREAMS[name]
    return make(omni)


def has_image(request: Sent) -> bool:
    return any(isinstance(part, Picture) for part in request.parts)


def joining(name: str, omni: bool, tokenizer: Any) -> list[Joining]:
    return [
        Joining(partial(r.prompt, tokenizer), r.max_tokens, r.joins_after) for r in sent(name, omni)
    ]
