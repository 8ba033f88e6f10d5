"""Engines on a GPU that tests share, each test in a process of its own (pytest-forked).

An engine takes a minute to start, and what a test's child starts or asks is gone with it. So the
parent starts the engines, some tests ahead; the children speak to them over connections that they
inherit, and keep in files what later ones would ask again.

    parent     start A, B     fork       stop A, start C     fork
    engines    A  B             A  B     B  C                  B  C
    children                  test of A                      test of B

The parent makes no CUDA call: a child could make none any more.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from vllm_deepstack import ROOT
from vllm_deepstack.check.compare import Run, tolerance
from vllm_deepstack.check.modes import EAGER, Mode
from vllm_deepstack.check.processes import import_path

from .conftest import missing_gpus, version
from .serving.engine import Engine
from .serving.soak import Soak, oracle_options, served_options
from .serving.streams import Request

DTYPE = "bfloat16"
NANO = "geo3k_nano"
MEMORY = 0.85  # of the GPU's, for all engines together
TINY = 0.04
CHECKPOINT = "CHECKPOINT"  # in an option: the folder of the model's checkpoint
AHEAD = max(2, len(os.sched_getaffinity(0)) * 5 // 8)  # engines: each has a core busy to start


@dataclass(frozen=True)
class Case:
    """A test's engines: a model in a mode, and the same eager, by which it is judged."""

    model: str
    """One of `tests.tiny_models`, `geo3k_nano`, or a name on the hub."""
    mode: Mode
    common: tuple[str, ...] = ()
    """Options of both."""
    common_env: tuple[tuple[str, str], ...] = ()

    @property
    def eager(self) -> Case:
        return replace(self, mode=EAGER)

    def lacking(self) -> str:
        """Why the release that is imported cannot run it; nothing if it can."""
        releases, reason = MODELS.get(self.model, ("", ""))
        if releases and not SpecifierSet(releases).contains(version()):
            return f"vLLM {version()}: {reason}"
        return self.mode.missing(version(), gpu=True)

    def __str__(self) -> str:
        return f"{self.model.rpartition('/')[2]}-{re.sub(r'[, ]+', '-', self.mode.name)}"


# Models that not all releases have, and why.
MODELS = {
    "moss_audio": (">=0.24", "MOSS-Audio came with 0.24.0"),
    "cohere_compass": (">=0.30", "Cohere Compass came with 0.30.0"),
    "granite4_vision": (
        ">=0.31",
        "Granite 4 Vision imports names that Transformers 5.10 has renamed, up to 0.30.0",
    ),
}


class Kept:
    """An engine that is asked about each request alone, and once."""

    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.folder = engine, folder

    def serve(self, stream: list[Request]) -> list[Run]:
        (request,) = stream
        digest = hashlib.sha256(repr(replace(request, joins_after=0)).encode()).hexdigest()
        file = self.folder / f"{digest}.npz"
        if not file.exists():
            (run,) = self.engine.serve([request])
            part = file.with_suffix(".part.npz")
            np.savez(part, tokens=run.tokens, logits=run.logits)
            part.replace(file)
        with np.load(file) as kept:
            return [Run(kept["tokens"], kept["logits"])]


class Fleet:
    def __init__(self, items: list[pytest.Item], folder: Path):
        self.folder = folder
        self.wanted = [(item.nodeid, wants(item)) for item in items]
        self.engines: dict[Case, Engine] = {}
        self.unreachable: dict[str, str] = {}
        """By model, why the hub does not give it."""
        self.broken: dict[str, str] = {}
        """By model, why there is no checkpoint otherwise."""
        models = {case.model for _, cases in self.wanted for case in cases}
        self.checkpoints = {name: self._checkpoint(name) for name in sorted(models)}

    def _checkpoint(self, model: str) -> Path:
        """Its folder. Tiny ones are made, in a process of their own: PyTorch's threads do not
        survive a fork."""
        if model == NANO:
            return ROOT / "benchmarks/geo3k_nano/model"
        if "/" not in model:
            command = [sys.executable, "-m", "tests.tiny_models", model, str(self.folder / model)]
            made = subprocess.run(command, env=import_path(), capture_output=True, text=True)
            if made.returncode:
                self.broken[model] = made.stderr
            return self.folder / model
        if Path(model).is_dir():
            return Path(model)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(model))
        except LocalEntryNotFoundError as error:
            self.unreachable[model] = f"{model} cannot be had: {error}"
        except (OSError, ValueError) as error:
            self.broken[model] = f"{model}: no folder, and none that the hub gives: {error}"
        return Path(model)

    def before(self, item: pytest.Item) -> None:
        """Starts what a test needs; and of what comes after it, as much as there is room for."""
        for case in [case for case, engine in self.engines.items() if engine.ended()]:
            self.engines.pop(case).stop()
        for number, (_, cases) in enumerate(self.wanted[self._place(item) :]):
            for case in cases:
                if case in self.engines or {case.model} & (self.unreachable | self.broken).keys():
                    continue
                room = sum(share(each.model) for each in [*self.engines, case]) <= MEMORY
                if number and not (room and len(self.engines) < AHEAD):
                    return
                self.engines[case] = self._start(case)

    def after(self, item: pytest.Item, failed: bool) -> None:
        """Stops what no later test needs, and what a test that failed may have left at work."""
        here = self._place(item)
        needed = {case for _, cases in self.wanted[here + 1 :] for case in cases}
        if failed:
            needed -= set(self.wanted[here][1])
        for case in set(self.engines) - needed:
            self.engines.pop(case).stop()

    def _place(self, item: pytest.Item) -> int:
        return next(i for i, (name, _) in enumerate(self.wanted) if name == item.nodeid)

    def stop(self, keep: bool) -> None:
        while self.engines:
            self.engines.popitem()[1].stop()
        if not keep:
            shutil.rmtree(self.folder)

    def _start(self, case: Case) -> Engine:
        model = self.checkpoints[case.model]
        if case.mode == EAGER:
            options = oracle_options(model, DTYPE)
        else:
            options = served_options(model, DTYPE, *case.mode.options)
        # Engines that profile side by side would each count the others' memory as theirs.
        cache = 2**30 if share(case.model) == TINY else 2**32
        options += [*case.common, "--gpu-memory-utilization", str(share(case.model))]
        options += ["--kv-cache-memory-bytes", str(cache)]
        options = [option.replace(CHECKPOINT, str(model)) for option in options]
        folder = self.folder / f"{case}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        env: dict[str, Any] = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),  # they compile side by side
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `apply_model`
            **dict(case.common_env),
            **dict(case.mode.env),
        }
        return Engine(str(case), options, folder, **env)

    def engine(self, case: Case) -> Engine:
        """Skips the test if the release or the hub does not have what it needs."""
        if reason := case.lacking() or self.unreachable.get(case.model):
            pytest.skip(reason)
        if reason := self.broken.get(case.model):
            pytest.fail(reason)
        return self.engines[case]

    def kept(self, case: Case) -> Path:
        """A folder for what an engine of a model has answered."""
        digest = hashlib.sha256(repr(case).encode()).hexdigest()[:8]
        folder = self.folder / f"answers-{case}-{digest}"
        folder.mkdir(exist_ok=True)
        return folder

    def oracle(self, case: Case) -> Kept:
        return Kept(self.engine(case.eager), self.kept(case.eager))

    def compare(
        self, case: Case, stream: list[Request], limit: float | None = None, **how: int
    ) -> dict[str, Any]:
        """Figures of a stream, served as `Engine.serve` has it, to each of its requests alone."""
        soak = Soak(self.engine(case), self.oracle(case), 0.0)
        found = list(soak.differences(stream, **how))
        limit = tolerance(DTYPE, soak.alone.values()) if limit is None else limit
        return {
            "model": case.model,
            "mode": case.mode.name,
            "requests": len(found),
            "wrong": sum(difference.largest > limit for difference in found),
            "largest": soak.largest,
            "tolerance": limit,
        }


def share(model: str) -> float:
    """Of the GPU's memory: so little of it that a dozen tiny engines start side by side."""
    return 0.4 if "/" in model else TINY


def case_of(item: pytest.Item) -> Case | None:
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    return next((value for value in (params or {}).values() if isinstance(value, Case)), None)


def wants(item: pytest.Item) -> list[Case]:
    case = case_of(item)
    return [] if case is None or case.lacking() or missing_gpus(item) else [case.eager, case]


def by_engine(items: list[Any]) -> list[Any]:
    """Tests of one engine one after the other, so that it need not wait for the last of them."""
    first: dict[Any, int] = {}
    for number, item in enumerate(items):
        first.setdefault(case_of(item) or item.nodeid, number)
    return sorted(items, key=lambda item: first[case_of(item) or item.nodeid])
