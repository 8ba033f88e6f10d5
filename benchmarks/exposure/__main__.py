"""Wrong requests in ordinary traffic, by requests in flight.

On a GPU: an engine for each model, mode and vLLM, and an eager one that serves the same traffic.
On a CPU: graphs are recorded and replayed. `replay` is breakable and full graphs, `replay-decode`
those of decode steps alone, vLLM's default. A request is wrong whose logits differ from the eager
engine's (in replay: from Python's on as many rows) while the contexts agree. Where the arithmetic
is the same (replay, batch-invariant) they must be equal, otherwise within the dtype's tolerance.

    python -m benchmarks.exposure --vllm released=TREE fork=TREE pr1=TREE \\
        --model geo3k_nano=DIR --modes default breakable -- [VLLM OPTION…]

Exit code: 0, also where an engine failed, which its rows say; 2 if the benchmark could not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.speed import page, results
from benchmarks.speed.workers import Variant
from tests.serving.test_gpu_engines import SPECULATIVE
from vllm_deepstack import cli
from vllm_deepstack.check.compare import Run, compare, tolerance
from vllm_deepstack.check.modes import (
    BATCH_INVARIANT,
    EAGER,
    EXTENSION,
    MODES,
    REPLAYS,
    Mode,
    graphs,
)
from vllm_deepstack.check.processes import EngineError, Job, engine_job, shared_cores, stopping
from vllm_deepstack.cli import UserError

from .engine import load
from .streams import STREAMS
from .traffic import ARRIVALS, Cell, Request, requests

Entry = dict[str, Any]
CELL = [field.name for field in fields(Cell)]
BACKEND = "--attention-backend"
BY_NAME = {mode.name: mode for mode in MODES} | {
    name: Mode(name, options)
    for name, options in {
        "ngram": SPECULATIVE,
        "full-triton": (*graphs("FULL"), BACKEND, "TRITON_ATTN"),
        "full-fa3": (*graphs("FULL"), BACKEND, "FLASH_ATTN"),  # version 3, on a Hopper
    }.items()
}
CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")
# vLLM's own limits for a server on an H100, and memory for several engines on one.
OPTIONS = ["--max-num-batched-tokens", "8192", "--max-num-seqs", "1024", "--max-model-len", "2048"]
OPTIONS += ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", "1G", "--seed", "0"]
OPTIONS += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", "--dtype", "bfloat16"]
REPLAY = Mode("replay", (*EAGER.options, "--dtype", "float32", *EXTENSION))


@dataclass(frozen=True)
class Arm:
    """A vLLM in a mode, and the engine that has it right: in replay, itself."""

    model: str
    mode: Mode
    vllm: str
    job: Job
    right: Job


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exposure",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, some = parser.add_argument, dict[str, Any](nargs="+", metavar="…")
    results.add_variants(parser)
    add("--model", required=True, nargs="+", metavar="NAME=DIR", help="checkpoints")
    add("--output-dir", type=Path, default=Path("exposure-results"), help="of results.json")
    add("--modes", choices=BY_NAME, default=["default"], **some, help=", ".join(BY_NAME))
    add("--in-flight", type=cli.positive, default=[1, 2, 4, 16, 64], **some)
    add("--arrivals", choices=ARRIVALS, default=ARRIVALS[:1], **some, help=", ".join(ARRIVALS))
    add("--share", type=float, default=[0.5], **some, help="of requests that have an image")
    add("--size", default=["small"], **some, help="of images: small, or a side's most pixels")
    add("--requests", type=cli.positive, default=260, metavar="N", help="of each kind of traffic")
    add("--system-prompt", type=int, default=0, metavar="TOKENS", help="with prefix caching")
    add("--traffic-seed", type=int, default=0, metavar="N")
    add("--at-once", type=cli.positive, default=8, metavar="N", help="engines")
    add("--rows", choices=["V1", "V2"], default="V2", help="in replay, in which runner's order")
    return parser.parse_args(arguments[:at]), arguments[at + 1 :]


def cells(args: argparse.Namespace) -> list[Cell]:
    sides = [0 if size == "small" else cli.positive(size) for size in args.size]
    kinds = product(args.share, sides, args.arrivals, args.in_flight)
    rest = (args.requests, args.system_prompt, args.traffic_seed)
    drawn = [Cell(kind, n, s, side, *rest) for s, side, kind, n in kinds if kind not in STREAMS]
    omni = any("omni" in text for text in args.model)
    return [*drawn, *(Cell(kind, 0, 0.0, omni=omni) for kind in args.arrivals if kind in STREAMS)]


def model_options(model: Path, served: list[Cell]) -> list[str]:
    """For the traffic, of which all begins with the same system prompt, or none."""
    limits = {"image": 1, "video": 0}
    if "omni" in json.loads((model / "config.json").read_text())["model_type"]:
        limits["audio"] = 0
    options = ["--model", str(model), "--limit-mm-per-prompt", json.dumps(limits)]
    options.append(f"--{'' if served[0].system else 'no-'}enable-prefix-caching")
    if side := max(cell.side for cell in served):  # above Geo3K-nano's own, which stay as they are
        size = {"longest_edge": max(side, 256) ** 2, "shortest_edge": 64**2}
        options += ["--mm-processor-kwargs", json.dumps({"size": size})]
    return options


def eager(mode: Mode) -> Mode:
    """With the same kernels."""
    at = mode.options.index(BACKEND) if BACKEND in mode.options else len(mode.options)
    backend = mode.options[at : at + 2]
    env = tuple(each for each in mode.env if each in BATCH_INVARIANT.env)
    name = "-".join(["eager", *backend[1:], *(["batch-invariant"] if env else [])])
    return Mode(name, (*EAGER.options, *backend), env)


def arms(args: argparse.Namespace, options: list[str], folder: Path) -> list[Arm]:
    vllms = [Variant.parse(text) for text in args.vllm]
    fork = next((each for each in vllms if each.name == "fork"), vllms[0])
    modes = [BY_NAME[name] for name in args.modes]
    replay = modes[0] in REPLAYS
    if any((mode in REPLAYS) != replay for mode in modes):
        raise UserError(f"--modes {' '.join(args.modes)}: replay is for a CPU, the rest for a GPU")
    jobs: dict[str, Job] = {}
    cores = shared_cores(args.at_once) if replay and args.at_once > 1 else [[]]

    def job(model: str, path: str, mode: Mode, vllm: Variant) -> Job:
        name = f"{model}.{mode.name}.{vllm.name}"
        if name not in jobs:
            every = [*model_options(Path(path), cells(args)), *OPTIONS, *mode.options, *options]
            place, module = cores[len(jobs) % len(cores)], f"{__package__}.engine"
            made = jobs[name] = engine_job(name, vllm.tree, every, folder, place, module, ".json")
            made.env |= {cache: str(folder / f"{name}.{cache.lower()}") for cache in CACHES}
            made.env.setdefault("DEEPSTACK_DISABLE", "1")  # each vLLM as its files are
            made.env |= dict(mode.env)
        return jobs[name]

    found = []
    for text, mode, vllm in product(args.model, modes, vllms):
        model, _, path = text.partition("=")
        if not Path(path, "config.json").is_file():
            raise UserError(f"--model {text}: not NAME=DIR, or no config.json in DIR")
        if replay:  # one engine is in all its modes
            one = other = job(model, path, REPLAY, vllm)
        else:
            one, other = job(model, path, mode, vllm), job(model, path, eager(mode), fork)
        found.append(Arm(model, mode, vllm.name, one, other))
    return found


def outcomes(jobs: list[Job], spec: Path, args: argparse.Namespace) -> Iterator[tuple[Job, str]]:
    """Runs them, so many at once. Each as it ends, with its error if it failed."""
    waiting, running, began = jobs[::-1], dict[Job, str](), time.monotonic()
    with results.progress(Console(stderr=True)) as progress, stopping(jobs):
        task = progress.add_task("engines", total=len(jobs))
        while waiting or running:
            while waiting and len(running) < args.at_once:
                waiting[-1].start(spec)
                running[waiting.pop()] = ""
            time.sleep(0.2)
            for job, before in list(running.items()):
                error = ""
                try:
                    stage = running[job] = job.stage()
                except EngineError:
                    stage = "failed"
                    error = str(job.failure(shutil.copy(job.log, args.output_dir)))
                if stage != before:
                    line = f"{time.monotonic() - began:5.0f} s  {job.name}: {stage}"
                    progress.console.print(line, highlight=False, soft_wrap=True)
                if error or stage == "done":
                    del running[job]
                    progress.advance(task)
                    yield job, error


def judged(sent: list[Request], ours: list[Run], right: list[Run], limit: float) -> Entry:
    """How many requests differ by more than `limit`; the largest |Δlogit|, of all and of each;
    other answers."""
    found = dict.fromkeys(("wrong_texts", "texts", "wrong_images", "images", "other_answers"), 0)
    rows: list[float] = []
    for request, *runs in zip(sent, ours, right, strict=True):
        difference, kind = compare(*runs), "images" if request.image else "texts"
        found[kind] += 1
        found[f"wrong_{kind}"] += not difference.largest <= limit
        found["other_answers"] += difference.agreed < difference.steps
        rows.append(difference.largest)
    return found | {"largest": max(rows), "limit": limit, "rows": rows}


def entries(arm: Arm, served: list[Cell], rows: str, errors: dict[Job, str]) -> list[Entry]:
    """Of an arm whose engines have ended: one for each cell."""
    replay = arm.mode in REPLAYS
    mode = arm.mode.name + (", V1's rows" if replay and rows == "V1" else "")
    base = {"model": arm.model, "mode": mode, "vllm": arm.vllm}
    error = errors[arm.job] or errors[arm.right]
    meta = {} if error else json.loads(arm.job.result.read_text())
    error = error or arm.mode.missing(meta["version"].partition(" ")[0], not replay)
    if error:
        return [base | asdict(cell) | {"error": error} for cell in served]
    base |= {name: meta[name] for name in ("version", "dtype", "graphs")}
    exact = replay or set(BATCH_INVARIANT.env) <= set(arm.mode.env)
    found = []
    for number, cell in enumerate(served):
        keys = [f"{number}-{arm.mode.name}-{by}" for by in ("graph", "python")]
        one, other = keys if replay else [str(number)] * 2
        ours, right = load(arm.job.result, one), load(arm.right.result, other)
        limit = 0.0 if exact else tolerance(meta["dtype"], right)
        counts = judged(requests(cell), ours, right, limit)
        if cell.arrivals not in STREAMS:
            del counts["rows"]
        found.append(base | asdict(cell) | counts | meta["served"][one])
    return found


def merged(before: Entry, run: Entry, new: list[Entry]) -> Entry:
    """Each entry says of which run it is; of one that was measured again, the last is kept."""
    new = [entry | {"run": len(before["runs"])} for entry in new]
    names = ("model", "mode", "vllm", *CELL)
    kept = {tuple(each[name] for name in names): each for each in [*before["entries"], *new]}
    return {"benchmark": "exposure", "runs": [*before["runs"], run], "entries": [*kept.values()]}


def table(found: list[Entry]) -> str:
    """Markdown: wrong texts by requests in flight, and wrong images where there are any."""
    columns = sorted({entry["in_flight"] for entry in found})
    lines: dict[tuple[str, ...], dict[int, Entry]] = {}
    for entry in found:
        traffic = str(Cell(**{name: entry[name] for name in CELL}))
        of = (entry["model"], entry["mode"], entry["vllm"], traffic)
        lines.setdefault(of, {})[entry["in_flight"]] = entry
    rows = []
    for line, counted in lines.items():
        wrong = any(entry.get("wrong_images") for entry in counted.values())
        for kind in ("texts", "images") if wrong else ("texts",):
            rows.append([*line, kind, *(said(counted.get(n), kind) for n in columns)])
    return page.table(["model", "mode", "vLLM", "traffic", "wrong", *map(str, columns)], rows)


def said(entry: Entry | None, kind: str) -> str:
    if entry is None or "error" in entry:
        return "failed" if entry else ""
    return f"{entry[f'wrong_{kind}']} of {entry[kind]}"


def execute(args: argparse.Namespace, options: list[str]) -> int:
    results.claim(args.output_dir)
    file, served = args.output_dir / "results.json", cells(args)
    before = json.loads(file.read_text()) if file.exists() else {"runs": [], "entries": []}
    new: list[Entry] = []
    done: dict[Arm, list[Entry]] = {}
    with tempfile.TemporaryDirectory(prefix="exposure.") as temporary:
        every = arms(args, options, Path(temporary))
        replays = [name for name in args.modes if BY_NAME[name] in REPLAYS]
        spec, ended, run = Path(temporary, "spec.json"), dict[Job, str](), machine()
        traffic = [asdict(cell) for cell in served]
        spec.write_text(json.dumps({"cells": traffic, "replays": replays, "rows": args.rows}))
        jobs = list(dict.fromkeys(job for arm in every for job in (arm.right, arm.job)))
        for job, error in outcomes(jobs, spec, args):
            ended[job] = error
            for arm in every:
                if arm not in done and {arm.job, arm.right} <= ended.keys():
                    done[arm] = entries(arm, served, args.rows, ended)
            new = [entry for arm in every for entry in done.get(arm, [])]
            cli.write_json(merged(before, run, new), file)
    print(table(new), end="")
    for error in dict.fromkeys(entry["error"] for entry in new if "error" in entry):
        print(f"\n{error}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(sys.argv[1:] if arguments is None else arguments)
    return cli.run(lambda: execute(args, options))


if __name__ == "__main__":
    sys.exit(main())
