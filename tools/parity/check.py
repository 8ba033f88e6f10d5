"""Runs the engines of `vllm-deepstack check`, and compares."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from .. import cli
from ..cli import UserError
from ..engines import EngineError, shared_cores
from .modes import EAGER, MODES
from .report import Report, exit_code, report, show
from .run import Result, arm_job, outcomes, reference_job, run, write_spec
from .samples import Sample, builtin, load


def validate(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a folder is not there.
    """
    if (
        args.model.startswith(("/", "./", "../", "~"))
        and not Path(args.model).expanduser().is_dir()
    ):
        raise UserError(f"--model {args.model}: the folder does not exist")
    if args.vllm and not (args.vllm / "vllm" / "__init__.py").is_file():
        raise UserError(f"--vllm {args.vllm}: no vLLM there: it has no vllm/__init__.py")
    for path in (args.html, args.junit):
        if path and path.is_dir():
            raise UserError(f"{path}: a folder; name a file")


def check(args: argparse.Namespace, options: list[str], folder: Path, console: Console) -> Report:
    if args.samples:
        samples = load(args.samples, args.num_samples)
    else:
        samples = builtin(args.num_samples or 5, folder)
    spec = write_spec(samples, args.samples is None, args.max_tokens, folder, probes=True)
    common = ["--model", args.model, "--dtype", args.dtype, "--seed", "0"]
    common += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", *options]
    at_once = 2 if args.side_by_side else 1
    if args.side_by_side and not any(
        o.replace("_", "-").startswith("--gpu-memory-util") for o in options
    ):
        common += ["--gpu-memory-utilization", "0.4"]  # of a CPU's memory, too
    cores = shared_cores(2) if args.side_by_side else [[], []]
    modes = [EAGER, *(mode for mode in MODES if mode.name in args.modes)]
    jobs = [arm_job(mode, args.vllm, common, folder, cores[i % 2]) for i, mode in enumerate(modes)]
    eager, *others = outcomes(jobs, spec, console, at_once)
    assert isinstance(eager, Result)
    reference = None
    if args.reference:
        if not args.samples:  # with as many images as the engine takes
            samples = [
                Sample(s.messages, images=s.images[:count])
                for s, count in zip(samples, eager.images)
            ]
            spec = write_spec(samples, True, args.max_tokens, folder)
        (reference,) = run(
            [reference_job(args.model, eager.meta["dtype"], folder)], spec, console, 1
        )
    arms = dict(zip([mode.name for mode in modes[1:]], others))
    return report(args.model, eager, arms, reference, args.tolerance)


def execute(args: argparse.Namespace, options: list[str]) -> int:
    validate(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # engines are stopped
    files = [Path(args.json)] if args.json not in (None, "-") else []
    for path in [*files, *filter(None, (args.html, args.junit))]:
        if path.is_file():
            path.unlink()  # an earlier check's
    folder = args.logs or Path(tempfile.mkdtemp(prefix="check."))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = check(args, options, folder.resolve(), Console(stderr=True))
    except UserError as error:
        if not args.logs and not isinstance(error, EngineError):
            shutil.rmtree(folder)
        raise
    for path in files:
        cli.write_json(result, path)
    if args.json == "-":
        print(cli.dumps(result), end="")
    else:
        show([result], Console(width=cli.width()))
    if args.junit:
        from .junit import junit

        cli.write_text(junit(result), args.junit)
    if args.html:
        from .page import page

        cli.write_text(page(result), args.html)
    failed = [arm for arm in result["arms"] if arm["reason"] and arm["verdict"] != "not run"]
    if not args.logs and not failed:
        shutil.rmtree(folder)
    return exit_code(result)
