"""How vLLM can be told to replay CUDA graphs, and by which of its model runners."""

from __future__ import annotations

import json

from packaging.specifiers import SpecifierSet

from tests.conftest import version
from tests.fleet import Case, Mode


def graphs(mode: str) -> tuple[str, ...]:
    return ("--compilation-config", json.dumps({"cudagraph_mode": mode}))


DEFAULT = Mode("default")
PIECEWISE = Mode("piecewise", graphs("PIECEWISE"))
# Captured for prefill, FlashAttention 3 does not decode: of text alone, too, and as released, the
# second token is wrong, by up to 32 (H100, bfloat16, 0.22.1 and 0.33.0).
TRITON = ("--attention-backend", "TRITON_ATTN")
FULL = Mode("full, Triton", graphs("FULL"))
BREAKABLE = Mode(
    "breakable",
    env=(("VLLM_USE_BREAKABLE_CUDAGRAPH", "1"),),
    releases=">=0.24",
    lacking="breakable graphs work for these models from 0.24.0 on",
)
# From 0.31.0 on, this switches breakable graphs on by itself for shapes that vLLM has tuned.
BATCH_INVARIANT = Mode("batch-invariant", env=(("VLLM_BATCH_INVARIANT", "1"),))
V1 = Mode(
    "V1",
    env=(("VLLM_USE_V2_MODEL_RUNNER", "0"),),
    releases=">=0.29",
    lacking="Model Runner V1 is the default, up to 0.28.0",
)
V2 = Mode(
    "V2",
    env=(("VLLM_USE_V2_MODEL_RUNNER", "1"),),
    releases=">=0.26,<0.29",
    lacking="Model Runner V2 gives raw logits from 0.26.0 on, and is the default from 0.29.0 on",
)
MODES = [DEFAULT, PIECEWISE, FULL, BREAKABLE, BATCH_INVARIANT, V1, V2]


def cases(model: str, *, modes: list[Mode] = MODES, common: tuple[str, ...] = ()) -> list[Case]:
    """A model in modes. Equal ones share engines, in whichever file their tests are."""
    if model == "qwen3_omni" and SpecifierSet("<0.24").contains(version()):
        # Its vision encoder does not run with FlashAttention 3, and no image would be served (D8).
        common = (*common, "--mm-encoder-attn-backend", "TORCH_SDPA")
    # Eager runs the same attention: kernels that differ move logits as much as graphs do.
    triton = {FULL: TRITON}
    return [Case(model, mode, (*common, *triton.get(mode, ()))) for mode in modes]
