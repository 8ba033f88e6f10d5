"""How vLLM can be told to compile a model, to replay CUDA graphs, and by which model runner."""

from __future__ import annotations

import json
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Mode:
    """Options and environment of an engine, and where there is such a mode."""

    name: str
    options: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    releases: str = ""
    lacking: str = ""
    """Why other releases cannot run it."""
    gpu: bool | None = True
    """Whether it needs one; None: whether it needs a CPU."""

    def missing(self, version: str, gpu: bool) -> str:
        """Why this vLLM cannot run it here; nothing if it can."""
        if not SpecifierSet(self.releases, prereleases=True).contains(version):
            return f"vLLM {version}: {self.lacking}"
        if gpu and self.gpu is None:
            return "is for a CPU; a GPU has the graphs themselves"
        return "needs a GPU" if self.gpu and not gpu else ""


def graphs(mode: str) -> tuple[str, ...]:
    return ("--compilation-config", json.dumps({"cudagraph_mode": mode}))


EAGER = Mode("eager", ("--enforce-eager",), gpu=False)
DEFAULT = Mode("default", gpu=False)
PIECEWISE = Mode("piecewise", graphs("PIECEWISE"))
FULL = Mode("full", graphs("FULL"))
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
    releases=">=0.26",
    lacking="Model Runner V2 gives raw logits from 0.26.0 on",
)
# On the eager engine: `replay.Graphs` says what is replayed.
REPLAY = Mode("replay", gpu=None)
REPLAY_DECODE = Mode("replay-decode", gpu=None)
REPLAYS = [REPLAY, REPLAY_DECODE]
EXTENSION = ("--worker-extension-cls", f"{__package__}.replay.Replay")
MODES = [DEFAULT, *REPLAYS, PIECEWISE, FULL, BREAKABLE, BATCH_INVARIANT, V1, V2]
