"""Serving: decoding, image-heavy prefill and start-up, of several vLLMs in turn.

All engines live side by side and take turns, so that what one run compares has met the same
machine. The first vLLM that is named is the one that the others are measured against. Options
that are not listed here go to the engines, under vLLM's names. The result is written as rounds
end: a run that is stopped leaves those that it has done.

    python -m benchmarks.speed.serving --model qwen3_vl_2b --vllm stock=TREE fork --eager fork

Exit code: 0, or 2 if the benchmark could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import machine
from vllm_deepstack import cli
from vllm_deepstack.cli import UserError

from . import models, plots, results
from .workers import Variant, Worker, workers

OPTIONS = ["--max-num-batched-tokens", "8192", "--enable-chunked-prefill"]
OPTIONS += ["--no-enable-prefix-caching"]
TURNS = 12
"""Times a round that all engines decode, a few steps each: how long a step of a small model takes
is up to the host, and what else keeps a host busy lasts longer than a few steps."""

Rounds = dict[str, list[dict[str, Any]]]
Answers = Iterator[tuple[str, dict[str, float]]]


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.serving",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    shapes = ", ".join(models.SHAPES)
    add("--model", required=True, help=f"{shapes}: random weights; or a checkpoint's folder")
    results.add_variants(parser)
    add("--eager", metavar="NAME", help="one of them that is run with --enforce-eager, too")
    add("--batch-sizes", type=cli.positive, nargs="*", default=[1, 8, 64, 256], metavar="N")
    add("--images", type=cli.positive, nargs="*", default=[1, 4, 16], metavar="N", help="a request")
    add("--image-size", type=cli.positive, default=1024, metavar="PIXELS", help="of a side")
    add("--steps", type=cli.positive, default=8, metavar="N", help="decode steps timed at a time")
    add("--rounds", type=cli.positive, default=7, metavar="N", help="after one that is not counted")
    add(
        "--starts",
        type=int,
        default=0,
        metavar="N",
        help="times that each engine is started by itself, the first time with empty caches "
        "(default: 0, all are started together and no time is taken)",
    )
    results.add_output(parser)
    args, options = parser.parse_known_args(arguments)
    return args, options


def variants(args: argparse.Namespace) -> list[Variant]:
    named = [Variant.parse(text) for text in args.vllm]
    by_name = {variant.name: variant for variant in named}
    if len(by_name) < len(named):
        raise UserError(f"--vllm {' '.join(args.vllm)}: two have the same name")
    if args.eager:
        if args.eager not in by_name:
            raise UserError(f"--eager {args.eager}: --vllm names {', '.join(by_name)}")
        named.append(Variant(f"{args.eager}-eager", by_name[args.eager].tree, eager=True))
    return named


def engine_options(args: argparse.Namespace, folder: Path) -> list[str]:
    if args.model in models.SHAPES:
        model = models.write(args.model, folder)
        source = ["--model", str(model), "--load-format", "dummy", "--max-model-len", "20480"]
    elif Path(args.model).is_dir():
        source = ["--model", args.model]
    else:
        raise UserError(f"--model {args.model}: no folder, and none of {', '.join(models.SHAPES)}")
    others = {"video": 0} | ({"audio": 0} if "omni" in args.model else {})
    limits = json.dumps({"image": max(args.images, default=1)} | others)
    return [*source, *OPTIONS, "--limit-mm-per-prompt", limits]


def start(
    engines: list[Worker], options: list[str], starts: int, progress: Progress
) -> tuple[dict[str, Any], Rounds]:
    """What each engine is, and the seconds of its starts."""
    task = progress.add_task("starting", total=max(1, starts) * len(engines))
    told: dict[str, dict[str, Any]] = {}
    seconds: Rounds = {engine.variant.name: [] for engine in engines}

    def begin(engine: Worker) -> None:
        engine.start()
        eager = ["--enforce-eager"] if engine.variant.eager else []
        engine.tell("start", options=[*options, *eager])

    def end(engine: Worker) -> None:
        progress.update(task, description=f"starting {engine.variant.name}")
        told[engine.variant.name] = engine.answer()
        progress.advance(task)

    for number in range(starts):
        for engine in engines:
            began = time.perf_counter()
            begin(engine)
            end(engine)
            took = {"seconds": time.perf_counter() - began}
            took["compilation_seconds"] = told[engine.variant.name]["compilation_seconds"]
            seconds[engine.variant.name].append(took)
            if number < starts - 1:
                engine.stop()
    if not starts:
        for engine in engines:
            begin(engine)
        for engine in engines:
            end(engine)
    return told, seconds


def measure(
    engines: list[Worker], args: argparse.Namespace, progress: Progress
) -> Iterator[list[dict[str, Any]]]:
    """The workloads with what was measured so far, after each round that counts."""
    workloads: list[dict[str, Any]] = [
        {"action": "decode", "batch": n, "prompt_tokens": 64, "steps": args.steps, "turns": TURNS}
        for n in args.batch_sizes
    ]
    most = max(args.images, default=0)  # images a round, of each workload
    workloads += [
        {
            "action": "prefill",
            "images": n,
            "side": args.image_size,
            "requests": k,
            "turns": most // (n * k),
        }
        for n in args.images
        for k in dict.fromkeys((1, most // n))
    ]
    rounds: list[Rounds] = [{engine.variant.name: [] for engine in engines} for _ in workloads]
    random = np.random.default_rng(0)
    task = progress.add_task("measuring", total=(args.rounds + 1) * len(workloads))
    for number in range(args.rounds + 1):
        for workload, answers in zip(workloads, rounds):
            progress.update(task, description=f"round {number}: {title(workload)}")
            how = {key: value for key, value in workload.items() if key != "action"}
            answered = decode if workload["action"] == "decode" else prefill
            for name, answer in answered(engines, random, **how):
                if number:
                    answers[name].append(answer)
            progress.advance(task)
        if number:
            yield [w | {"rounds": answers} for w, answers in zip(workloads, rounds)]


def decode(
    engines: list[Worker], random: np.random.Generator, *, turns: int, steps: int, **how: Any
) -> Answers:
    """All engines decode at the same time, but for a few steps at a time, one after another."""
    for engine in engines:
        engine.ask("admit", seed=0, turns=turns, steps=steps, **how)
    for engine in in_turn(engines, random, turns):
        yield engine.variant.name, {"seconds": engine.ask("decode", steps=steps)}
    for engine in engines:
        engine.ask("finish")


def prefill(
    engines: list[Worker], random: np.random.Generator, *, turns: int, **how: Any
) -> Answers:
    for engine in in_turn(engines, random, turns):
        yield engine.variant.name, engine.ask("prefill", seed=0, **how)


def in_turn(engines: list[Worker], random: np.random.Generator, turns: int) -> Iterator[Worker]:
    """A workload's turns, each in an order of its own.

    An engine finds the GPU as the one before it has left it, cooler after eager steps, between
    which it waits: if all turns had the same order, that would seem to be the engine's own.
    """
    for _ in range(turns):
        yield from (engines[index] for index in random.permutation(len(engines)))


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What tables and plots show: medians and quartiles, and each round's ratio to the first."""
    found = []
    workloads = [*started(result["starts"]), *result["workloads"]]
    for workload in workloads:
        rounds = workload["rounds"]
        base = np.array([each["seconds"] for each in next(iter(rounds.values()))])
        for name, answers in rounds.items():
            seconds = np.array([each["seconds"] for each in answers])
            row = {
                "workload": title(workload),
                "action": workload["action"],
                "vllm": name,
                "seconds": results.spread(seconds),
                "ratio": results.spread(seconds / base),
            }
            if workload["action"] == "decode":
                row["tokens_per_second"] = workload["batch"] / float(np.median(seconds))
            if workload["action"] == "prefill":
                rates = [each["prompt_tokens"] / each["seconds"] for each in answers]
                row["tokens_per_second"] = float(np.median(rates))
            found.append(row)
    return found


def started(starts: Rounds) -> list[dict[str, Any]]:
    """The first start, and the last if there were several."""
    counts = {len(each) for each in starts.values()}
    titles = {0: "start, empty caches", -1: "start, warm caches"} if max(counts) > 1 else {}
    return [
        {
            "action": "start",
            "title": title,
            "rounds": {name: [each[number]] for name, each in starts.items()},
        }
        for number, title in titles.items()
    ]


def title(workload: dict[str, Any]) -> str:
    if workload["action"] == "start":
        return workload["title"]
    if workload["action"] == "decode":
        return f"decode, batch {workload['batch']}"
    images = f"{workload['images']} image{'s' if workload['images'] > 1 else ''}"
    if workload["requests"] == 1:
        return f"first token, {images}"
    return f"prefill, {workload['requests']} × {images}"


def show(result: dict[str, Any], console: Console) -> None:
    console.print(f"{result['model']} on {results.device(result)}, {result['dtype']}")
    names = list(result["vllm"])
    table = Table(box=None, pad_edge=False)
    table.add_column("milliseconds")
    for name in names:
        table.add_column(name, justify="right")
    by_workload: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        by_workload.setdefault(row["workload"], {})[row["vllm"]] = row
    for workload, row in by_workload.items():
        cells = [f"{1e3 * row[names[0]]['seconds']['median']:.2f}"]
        for name in names[1:]:
            median = 1e3 * row[name]["seconds"]["median"]
            cells.append(f"{median:.2f}  {results.times(row[name]['ratio'])}")
        table.add_row(workload, *cells)
    console.print(table)
    console.print(f"×: to {names[0]}, the median of the rounds' ratios and their quartiles")


def benchmark(args: argparse.Namespace, options: list[str], console: Console) -> dict[str, Any]:
    """The whole result; on the way it is written as far as it goes."""
    named = variants(args)
    results.claim(args.output_dir)
    with (
        tempfile.TemporaryDirectory(prefix="speed.") as temporary,
        workers(named, "benchmarks.speed.engine", args.logs) as engines,
        results.progress(console) as progress,
    ):
        every = [*engine_options(args, Path(temporary)), *options]
        told, starts = start(engines, every, args.starts, progress)
        result: dict[str, Any] = {
            "benchmark": "serving",
            "model": args.model,
            "dtype": next(iter(told.values()))["dtype"],
            "engine_options": every[every.index("--max-num-batched-tokens") :],
            "vllm": told,
            "machine": machine(),
            "rounds": 0,
            "starts": starts,
            "workloads": [],
        }
        for number, workloads in enumerate(chain([[]], measure(engines, args, progress))):
            result |= {"rounds": number, "workloads": workloads}
            result["rows"] = rows(result)
            cli.write_json(shown(result), output(args))
        for engine in engines:
            engine.stop()
    return result


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """Without the turns, of which the rows have medians and quartiles."""
    return {key: value for key, value in result.items() if key != "workloads"}


def output(args: argparse.Namespace) -> Path:
    return args.output_dir / f"serving-{Path(args.model).name}.json"


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(arguments)
    return cli.run(lambda: execute(args, options))


def execute(args: argparse.Namespace, options: list[str]) -> int:
    result = benchmark(args, options, Console(stderr=True))
    plots.serving(result, output(args).with_suffix(".png"))
    show(result, Console(width=cli.width()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
