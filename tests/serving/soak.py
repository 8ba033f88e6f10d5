"""Serves random streams of requests, and compares each with the same request alone.

    python -m tests.serving.soak --model DIR --num-requests 500 --seed 1 [VLLM_OPTION…]

The engine under test gets vLLM's options; the other one, eager and without a cache of
prefixes, is the oracle. On failure the stream is shrunk to a short one that still fails.
Exit code 0: no difference; 1: a difference; 2: an engine died.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Flaky
from tqdm import tqdm

from vllm_deepstack.check.compare import TOLERANCE, Difference, Run, compare
from vllm_deepstack.check.processes import EngineError, bound, shared_cores
from vllm_deepstack.cli import UserError

from .engine import Engine
from .streams import LIMITS, MAX_MODEL_LEN, Request, streams


class DifferenceError(AssertionError):
    """A request did not get what it gets alone."""


class Oracle(Protocol):
    """Asked about one request at a time."""

    def serve(self, stream: list[Request], /) -> list[Run]: ...


class Served(Protocol):
    """An engine, or in a mode of it."""

    def budget(self) -> int: ...

    def serve(self, stream: list[Request], threshold: int = 0, /) -> list[Run]: ...


@dataclass
class Soak:
    """Compares an engine with an oracle. The oracle is asked once about each request."""

    served: Served
    oracle: Oracle
    tolerance: float
    requests: int = 0
    compared: int = 0
    """Steps whose contexts were the same, and so their logits could be compared."""
    steps: int = 0
    largest: float = 0.0
    """The largest |Δlogit| so far."""
    first_failure: int | None = None
    """The number of requests that it took to find one that differs."""

    def __post_init__(self) -> None:
        self.alone: dict[Request, Run] = {}
        self.found: list[tuple[str, list[Request]]] = []

    def differences(self, stream: list[Request], threshold: int = 0) -> Iterator[Difference]:
        """Of each request, served as `Engine.serve` has it, to the same request alone."""
        for request, run in zip(stream, self.served.serve(stream, threshold)):
            if request not in self.alone:
                (self.alone[request],) = self.oracle.serve([request])
            difference = compare(run, self.alone[request])
            self.requests += 1
            self.steps += difference.steps
            self.compared += min(difference.agreed + 1, difference.steps)
            self.largest = max(self.largest, difference.largest)
            yield difference

    def check(self, stream: list[Request]) -> None:
        """Raises DifferenceError unless all logits are within the tolerance.

        Tokens that differ while the logits agree are ties; what follows them is not compared.
        """
        for number, difference in enumerate(self.differences(stream)):
            if not difference.largest <= self.tolerance:
                self.first_failure = self.first_failure or self.requests
                message = (
                    f"request {number} of {len(stream)}: |Δlogit| {difference.first:.2g} at the "
                    f"first token, {difference.decode or 0:.2g} later (tolerance {self.tolerance})"
                )
                self.found.append((message, stream))
                raise DifferenceError(message)

    def run(self, modalities: tuple[str, ...], count: int, seed: int) -> None:
        """Checks streams until they had `count` requests.

        Raises:
            DifferenceError: a request differs; the notes have the shrunk stream and the seed.
        EngineError: an engine died; the notes have the stream.
        """
        budget = self.served.budget()
        died: list[EngineError] = []  # what Hypothesis must not take for a failure to shrink
        with tqdm(total=count, unit="request", disable=None) as bar:

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=count,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(streams(modalities, budget))
            def serve(stream: list[Request]) -> None:
                if died or (self.requests >= count and not self.first_failure):
                    return
                try:
                    self.check(stream)
                except EngineError as error:
                    error.add_note(f"while it served, with --seed {seed}: {stream}")
                    died.append(error)
                bar.update(len(stream))

            try:
                serve()
            except Flaky as error:
                # Served again, the stream passed: what was left of an earlier one was in it.
                message, stream = self.found[0]
                raise DifferenceError(
                    f"{message}\nnot shrunk, it did not recur: {stream}\n"
                    f"found by --seed {seed}, after {self.first_failure} requests"
                ) from error
            except DifferenceError as error:
                error.add_note(f"found by --seed {seed}, after {self.first_failure} requests")
                raise
        if died:
            raise died[0]


MODALITIES = {
    "qwen3_omni_moe": ("image", "video", "audio"),
    "cohere_compass": ("image",),
    "granite4_vision": ("image",),
    "moss_audio": ("audio",),
    "ernie4_5_moe_vl": ("image",),
}


def modalities(model: Path) -> tuple[str, ...]:
    kind = json.loads((model / "config.json").read_text())["model_type"]
    return MODALITIES.get(kind, ("image", "video"))


def oracle_options(model: Path, dtype: str) -> list[str]:
    limits = {modality: LIMITS[modality] for modality in modalities(model)}
    return [
        *("--model", str(model), "--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN)),
        *("--limit-mm-per-prompt", json.dumps(limits), "--max-num-seqs", "32"),
        *("--enforce-eager", "--no-enable-prefix-caching"),
    ]


def with_prompt_embeds(model: Path) -> tuple[str, ...]:
    """For engines that have `--enable-prompt-embeds`."""
    return (*modalities(model), "prompt_embeds")


def served_options(model: Path, dtype: str, *options: str) -> list[str]:
    """The oracle's, compiled and with `options`."""
    return [*oracle_options(model, dtype)[:-2], *options]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.serving.soak",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's folder")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--tolerance", type=float, help="largest |Δlogit| that passes")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", type=Path, help="test the vLLM in this folder")
    for name in ("--gpu-memory-utilization", "--kv-cache-memory-bytes"):
        parser.add_argument(name, help="of each of the two engines")
    parser.set_defaults(gpu_memory_utilization="0.4")  # of a CPU's memory, too
    args, options = parser.parse_known_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there")
    memory = ["--gpu-memory-utilization", args.gpu_memory_utilization]
    if args.kv_cache_memory_bytes:
        memory += ["--kv-cache-memory-bytes", args.kv_cache_memory_bytes]
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    engines: list[Engine] = []
    try:
        for name, core, options_, tree in (
            ("served", 0, served_options(args.model, args.dtype, *options), args.vllm),
            ("oracle", 1, oracle_options(args.model, args.dtype), None),
        ):
            env = bound(shared_cores(2)[core]) | {"VLLM_CACHE_ROOT": str(folder / "cache")}
            engines.append(Engine(name, [*options_, *memory], folder, tree, **env))
        served, oracle = engines
        soak = Soak(served, oracle, args.tolerance or TOLERANCE[args.dtype])
        soak.run(modalities(args.model), args.num_requests, args.seed)
    except UserError as error:
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"error: {error}", *notes, f"logs: {folder}"]), file=sys.stderr)
        return 2
    except DifferenceError as error:
        print("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return 1
    finally:
        for engine in engines:
            engine.stop()
    print(
        f"{soak.requests} requests, {soak.compared} of {soak.steps} steps compared: "
        f"largest |Δlogit| {soak.largest:.2g} (tolerance {soak.tolerance})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
