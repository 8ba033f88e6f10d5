"""Runs the engines of `vllm-deepstack check`, and compares."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from .. import cli
from ..cli import UserError
from ..engines import engine_job, shared_cores
from .report import Report, report, show
from .run import ENGINE, reference_job, run, write_spec
from .samples import Sample, builtin, load


def check(args: argparse.Namespace, options: list[str], folder: Path, console: Console) -> Report:
    if (
        args.model.startswith(("/", "./", "../", "~"))
        and not Path(args.model).expanduser().is_dir()
    ):
        raise UserError(f"--model {args.model}: the folder does not exist")
    if args.vllm and not (args.vllm / "vllm" / "__init__.py").is_file():
        raise UserError(f"--vllm {args.vllm}: no vLLM there: it has no vllm/__init__.py")
    if args.samples:
        samples = load(args.samples, args.num_samples)
    else:
        samples = builtin(args.num_samples or 5, folder)
    spec = write_spec(samples, args.samples is None, args.max_tokens, folder)
    common = ["--model", args.model, "--dtype", args.dtype, "--seed", "0"]
    common += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", *options]
    if args.side_by_side and not any(
        o.replace("_", "-").startswith("--gpu-memory-util") for o in options
    ):
        common += ["--gpu-memory-utilization", "0.4"]  # of a CPU's memory, too
    cores = shared_cores(2) if args.side_by_side else [[], []]
    jobs = [
        engine_job("eager", args.vllm, [*common, "--enforce-eager"], folder, cores[0], ENGINE),
        engine_job("compiled", args.vllm, common, folder, cores[1], ENGINE),
    ]
    eager, compiled = run(jobs, spec, console, args.side_by_side)
    reference = None
    if args.reference:
        if not args.samples and not any(eager.images):  # a model that takes none
            spec = write_spec([Sample(s.messages) for s in samples], True, args.max_tokens, folder)
        (reference,) = run(
            [reference_job(args.model, eager.meta["dtype"], folder)], spec, console, False
        )
    return report(args.model, eager, compiled, reference, args.tolerance)


def execute(args: argparse.Namespace, options: list[str]) -> int:
    folder = args.logs or Path(tempfile.mkdtemp(prefix="parity."))
    folder.mkdir(parents=True, exist_ok=True)
    result = check(args, options, folder.resolve(), Console(stderr=True))
    if not args.logs:
        shutil.rmtree(folder)
    if args.json == "-":
        print(cli.dumps(dict(result)), end="")
    else:
        if args.json:
            cli.write_json(dict(result), Path(args.json))
        show([result], Console())
    return 0 if result["agrees"] else 1
