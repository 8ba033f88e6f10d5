"""The modes of the check, as the tests run them on each release."""

from __future__ import annotations

from dataclasses import replace

from packaging.specifiers import SpecifierSet

from tests.conftest import version
from tests.fleet import Case
from vllm_deepstack.check import modes
from vllm_deepstack.check.modes import BATCH_INVARIANT, BREAKABLE, DEFAULT, PIECEWISE, V1, Mode

# Captured for prefill, FlashAttention 3 does not decode: of text alone, too, and as released, the
# second token is wrong, by up to 32 (H100, bfloat16, 0.22.1 and 0.33.0).
TRITON = ("--attention-backend", "TRITON_ATTN")
FULL = replace(modes.FULL, name="full, Triton")
V2 = replace(
    modes.V2,
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
