"""One engine's part: serves all traffic, in a process of its own, which `__main__` starts.

python -m benchmarks.exposure.engine SPEC RESULT VLLM_OPTION…
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_deepstack.check.compare import Run
from vllm_deepstack.check.processes import STAGE, make_engine, vllm_name
from vllm_deepstack.check.stepping import RefusedError, chunks, flush, replaying, step_through

from .streams import chunk
from .traffic import Cell, joining, words


def main(spec: Path, result: Path, options: list[str]) -> None:
    """Writes what each cell's requests got beside the result, which comes last."""
    job = json.loads(spec.read_text())
    cells = [Cell(**each) for each in job["cells"]]
    print(f"{STAGE}starting the engine", flush=True)
    llm = make_engine(options)
    meta: dict[str, Any] = {
        "version": vllm_name(),
        "dtype": str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch."),
        "graphs": record(llm, job["rows"]) if job["replays"] else graphs(llm),
        "served": {},
    }
    # In replay, in each mode: what is right, by Python on as many rows, and by the graph.
    passes = [[mode, by] for mode in job["replays"] for by in ("python", "graph")]
    for number, cell in enumerate(cells):
        for how in passes or [[]]:
            title = f"{number + 1} of {len(cells)}: {cell}, {cell.in_flight} in flight"
            print(f"{STAGE}{' '.join([title, *how])}", flush=True)
            key = "-".join([str(number), *how])
            meta["served"][key] = serve(llm, cell, runs_file(result, key), *how)
    result.write_text(json.dumps(meta))


def graphs(llm: Any) -> dict[str, Any]:
    """What vLLM captured, which is not always what it was asked for."""
    config = llm.llm_engine.vllm_config
    sizes = config.compilation_config.cudagraph_capture_sizes or []
    return {
        "cudagraph_mode": getattr(config.compilation_config.cudagraph_mode, "name", "NONE"),
        # vLLM sets it by itself, in this process, for some models and shapes.
        "breakable": os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1",
        "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "sizes": len(sizes),
        "largest": max(sizes, default=0),
    }


def record(llm: Any, rows: str) -> dict[str, Any]:
    """Records `forward` at vLLM's sizes, for steps whose rows are in that model runner's order.

    Raises:
        RuntimeError: this engine cannot be recorded.
    """
    (found,) = llm.collective_rpc("replay_record", args=(rows == "V2",))
    if reason := found.get("refused"):
        raise RuntimeError(f"replay: {reason}")
    sizes = {"sizes": len(found["sizes"]), "largest": max(found["sizes"])}
    return found | sizes | {"runner": f"{rows}'s rows"}


def serve(llm: Any, cell: Cell, file: Path, mode: str = "", by: str = "") -> dict[str, Any]:
    """Serves a cell and writes what its requests got: tokens, and logits `[steps, vocabulary]`.

    Raises:
        RefusedError: the engine refuses a request.
    """
    # Nothing of the cell before is staged, or in the prefix cache.
    llm.reset_prefix_cache()
    flush(llm, partial(words, np.random.default_rng(99)))
    llm.reset_prefix_cache()
    began, ended, present = time.monotonic(), 0, 0
    arrays: dict[str, np.ndarray] = {}
    with chunks(llm, chunk(cell.arrivals)), replaying(llm, mode, by) if mode else nullcontext():
        served = step_through(llm, joining(cell, llm.get_tokenizer()))
    for number, each in enumerate(served):
        if isinstance(each, RefusedError):
            raise each
        assert each.run
        arrays |= {f"tokens_{number}": each.run.tokens, f"logits_{number}": each.run.logits}
        ended, present = max(ended, each.ended + 1), present + each.ended + 1 - each.joined
    np.savez(file, **arrays)  # type: ignore[arg-type]
    counts = llm.collective_rpc("replay_counts")[0] if mode else {}
    mean, seconds = round(present / ended, 1), round(time.monotonic() - began, 1)
    return counts | {"steps": ended, "mean_in_flight": mean, "seconds": seconds}


def runs_file(result: Path, key: str) -> Path:
    return result.with_name(f"{result.stem}.{key}.npz")


def load(result: Path, key: str) -> list[Run]:
    """What the requests of a cell got, in the order in which they came."""
    with np.load(runs_file(result, key)) as data:
        count = len(data.files) // 2
        return [Run(data[f"tokens_{i}"], data[f"logits_{i}"]) for i in range(count)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
