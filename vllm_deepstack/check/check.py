"""Runs the engines of `vllm-deepstack check`, and compares."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from .. import cli
from ..cli import UserError
from .modes import DEFAULT, EAGER, MODES, REPLAYS
from .processes import EngineError, Job
from .report import Report, exit_code, report, show
from .run import Result, arm_job, outcomes, reference_job, run, write_spec
from .samples import Sample, builtin, load


def validate(args: argparse.Namespace, trees: Iterable[Path | None]) -> None:
    """
    Raises:
        UserError: a folder is not there.
    """
    model = args.model or ""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise UserError(f"--model {model}: the folder does not exist")
    for tree in filter(None, trees):
        if not (tree / "vllm" / "__init__.py").is_file():
            raise UserError(f"--vllm {tree}: no vLLM there: it has no vllm/__init__.py")
    for path in (args.html, args.junit):
        if path and path.is_dir():
            raise UserError(f"{path}: a folder; name a file")


def check(
    args: argparse.Namespace,
    options: list[str],
    trees: dict[str, Path | None],
    folder: Path,
    console: Console,
) -> list[Report]:
    """Checks the vLLM in each tree (None: the installed one), all with the same samples."""
    if args.samples:
        samples = load(args.samples, args.num_samples)
    else:
        samples = builtin(args.num_samples or 5, folder)
    spec = write_spec(samples, args.samples is None, args.max_tokens, folder, probes=True)
    # The line first: its model has no name before it.
    common = [*options, *(["--dtype", args.dtype] if args.dtype else [])]
    common += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1"]
    common += [] if given(options, "--seed") else ["--seed", "0"]
    at_once = 2 if args.side_by_side else 1
    if args.side_by_side and not given(options, "--gpu-memory-util"):
        common += ["--gpu-memory-utilization", "0.4"]  # of a CPU's memory, too
    # By default an engine that can replay is asked to, unless its worker is extended already.
    extended = given(options, "--worker-ext")
    names = args.modes or [DEFAULT.name, *(mode.name for mode in REPLAYS if not extended)]
    wanted = [mode for mode in MODES if mode.name in names]
    replays = [mode for mode in wanted if mode in REPLAYS]
    modes = [mode for mode in wanted if mode not in REPLAYS]
    jobs: dict[str, list[Job]] = {}
    for name, tree in trees.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        first = arm_job(EAGER, tree, common, place, f"{name} eager".strip(), replays)
        others = [
            arm_job(mode, tree, common, place, f"{name} {mode.name}".strip()) for mode in modes
        ]
        jobs[name] = [first, *others]
    every = [job for each in jobs.values() for job in each]
    needed = [first for first, *_ in jobs.values()]
    found = dict(zip(every, outcomes(every, spec, console, at_once, needed, args.timeout or 3600)))
    reports: list[Report] = []
    for of_tree in jobs.values():
        eager, others = found[of_tree[0]], of_tree[1:]
        assert isinstance(eager, Result)
        arms = dict(zip([mode.name for mode in modes], [found[job] for job in others]))
        for mode in replays:
            why = eager.replay_error or eager.error
            arms[mode.name] = eager.replays.get(mode.name, EngineError(why))
        if not args.modes and eager.meta["gpu"]:
            arms = {mode: arm for mode, arm in arms.items() if mode == DEFAULT.name}
        reference = None
        if args.reference and eager.meta["pooling"]:
            eager.meta["notes"].append("Transformers, with which no pooling model is compared")
        elif args.reference:
            reference = transformers(args, samples, eager, folder, console)
        reports.append(
            report(eager.meta["model"], eager, arms, reference, args.tolerance, args.max_kl)
        )
    return reports


def given(options: list[str], name: str) -> bool:
    """vLLM takes `_` for `-`, and the beginning of a name for the name."""
    return any(option.replace("_", "-").startswith(name) for option in options)


def transformers(
    args: argparse.Namespace, samples: list[Sample], eager: Result, folder: Path, console: Console
) -> Result:
    """What it gives for the samples, with as many images as the engine takes."""
    if not args.samples:
        samples = [
            Sample(s.messages, images=s.images[:count]) for s, count in zip(samples, eager.images)
        ]
    chat = eager.meta["chat"]
    spec = write_spec(samples, args.samples is None, args.max_tokens, folder, chat=chat)
    job = reference_job(eager.meta["model"], eager.meta["dtype"], folder)
    (found,) = run([job], spec, console, 1)
    return found


def execute(args: argparse.Namespace, options: list[str]) -> int:
    validate(args, [args.vllm])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # engines are stopped
    files = [Path(args.json)] if args.json not in (None, "-") else []
    for path in [*files, *filter(None, (args.html, args.junit))]:
        if path.is_file():
            path.unlink()  # an earlier check's
    folder = args.logs or Path(tempfile.mkdtemp(prefix="check."))
    folder.mkdir(parents=True, exist_ok=True)
    keeping = bool(args.logs)
    try:
        (result,) = check(args, options, {"": args.vllm}, folder.resolve(), Console(stderr=True))
        keeping |= any(arm["verdict"] == "failed" for arm in result["arms"])
    except EngineError:  # which names its log
        keeping = True
        raise
    finally:
        if not keeping:
            shutil.rmtree(folder)
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
    return exit_code(result)
