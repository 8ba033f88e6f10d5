"""Accuracy on Geo3K: greedy answers, graded by their box.

On vLLM's engines, eager and compiled, one after the other; options that are not listed here
go to them, under vLLM's names. Or on endpoints, with --base-url. An interrupted evaluation
goes on where it was when it is called again.

Exit code: 0, or 2 if the evaluation could not run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine
from vllm_deepstack import cli
from vllm_deepstack.cli import UserError

from . import INSTRUCTION
from .data import GEO3K, load
from .report import plot, report, show
from .runs import SERVED, Run, claim, execute, fingerprint, job_of, prepare

OWN = ("--enforce-eager", "--no-enforce-eager")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geo3k",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE stands for the arguments in a file, one per line",
    )
    parser.add_argument(
        "--model",
        help="a checkpoint's folder or its name on the hub; with --base-url the name under "
        "which it is served (default: the only one that is)",
    )
    parser.add_argument(
        "--dataset",
        default=GEO3K,
        help=f"a name on the hub or a folder of parquet files (default: {GEO3K})",
    )
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--num-samples", type=cli.positive, metavar="N", help="the first N questions"
    )
    parser.add_argument(
        "--max-tokens", type=cli.positive, default=2048, help="a response (default: 2048)"
    )
    parser.add_argument("--dtype", default="auto", help="as vLLM has it (default: auto)")
    parser.add_argument(
        "--runs",
        nargs="+",
        metavar="RUN",
        help="eager, compiled, transformers; eager@TREE and compiled@TREE: of another vLLM, in a "
        "folder that contains vllm/ (default: eager compiled; none with --base-url)",
    )
    parser.add_argument(
        "--base-url",
        nargs="+",
        default=[],
        metavar="URL",
        help="endpoints that serve the model, such as http://localhost:8000/v1; they share the "
        "questions (OPENAI_API_KEY: their key)",
    )
    parser.add_argument(
        "--concurrency",
        type=cli.positive,
        default=64,
        help="requests in flight, over all endpoints (default: 64)",
    )
    parser.add_argument(
        "--blank-images",
        action="store_true",
        help="white images in place of the questions': what is answered without looking",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("geo3k-results"),
        help="answers, report.json, accuracy.png and logs (default: geo3k-results)",
    )
    parser.add_argument("--overwrite", action="store_true", help="forget what it has")
    args, options = parser.parse_known_args(arguments)
    for option in options:
        if option.split("=")[0] in OWN:
            parser.error(f"{option}: --runs eager and --runs compiled set this")
    if args.base_url and options:
        parser.error(f"{options[0]}: endpoints have been given their options")
    if args.runs is None:
        args.runs = [] if args.base_url else ["eager", "compiled"]
    if args.runs and not args.model:
        parser.error("--model is required")
    return args, options


def evaluate(args: argparse.Namespace, options: list[str], console: Console) -> dict[str, Any]:
    runs = [Run.parse(text) for text in args.runs]
    if args.base_url:
        runs.append(Run(SERVED, SERVED))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"--runs {' '.join(args.runs)}: two have the same name")
    local = args.model and args.model.startswith(("/", "./", "../", "~"))
    if local and not args.base_url and not Path(args.model).expanduser().is_dir():
        raise UserError(f"--model {args.model}: the folder does not exist")
    questions = load(args.dataset, args.split, args.num_samples)
    folder = args.output_dir.resolve()
    settings = {
        "model": args.model,
        "dataset": args.dataset,
        "split": args.split,
        "instruction": INSTRUCTION,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "engine_options": options,
        "blank_images": args.blank_images,
        "questions_sha256": fingerprint(questions),
    }
    claim(folder, settings, args.overwrite)
    asked = prepare(questions, folder, args.blank_images, console)
    serve = {"base_urls": args.base_url, "model": args.model, "concurrency": args.concurrency}
    outcomes = execute(
        runs,
        asked,
        lambda run: job_of(run, args.model, args.dtype, options, folder),
        serve,
        args.max_tokens,
        folder,
        console,
    )
    return report(outcomes, settings | {"machine": machine()})


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(arguments)
    return cli.run(lambda: execute_and_show(args, options))


def execute_and_show(args: argparse.Namespace, options: list[str]) -> int:
    result = evaluate(args, options, Console(stderr=True))
    cli.write_json(result, args.output_dir / "report.json")
    plot(result, args.output_dir / "accuracy.png")
    show(result, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
