"""Does a model give the same logits compiled as eager?

Runs it in two vLLM engines, each in a process of its own, on the same samples, greedily.
Options that are not listed here go to both engines: they are vLLM's own, under its names.

Exit code: 0 they agree, 1 they diverge, 2 the check could not run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tools import cli
from tools.cli import UserError
from tools.engines import engine_job, shared_cores

from .report import Report, report, show
from .run import ENGINE, reference_job, run, write_spec
from .samples import FORMAT, Sample, builtin, load

# What the check itself decides; given to an engine they would undo it.
OWN = (
    "--enforce-eager",
    "--no-enforce-eager",
    "--logprobs-mode",
    "--max-logprobs",
    "--max_logprobs",
)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m tools.parity",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE stands for the arguments in a file, one per line",
    )
    parser.add_argument(
        "--model", required=True, help="a checkpoint's folder, or its name on the hub"
    )
    parser.add_argument("--samples", type=Path, help=f"JSON lines (default: built in); {FORMAT}")
    parser.add_argument(
        "--num-samples", type=cli.positive, help="how many samples (default: all; 5 built-in ones)"
    )
    parser.add_argument(
        "--max-tokens", type=cli.positive, default=8, help="tokens a sample (default: 8)"
    )
    parser.add_argument("--dtype", default="auto", help="as vLLM has it (default: auto)")
    parser.add_argument(
        "--tolerance", type=float, help="largest |Δlogit| that is agreement (default: by dtype)"
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="TREE",
        help="a folder that contains another vllm/ than the installed one",
    )
    parser.add_argument("--reference", action="store_true", help="compare with Transformers, too")
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="both engines at once, with half the memory each and, on a CPU, half the cores",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or to stdout instead of the table",
    )
    parser.add_argument(
        "--logs", type=Path, help="keep the engines' logs and results in this folder"
    )
    args, options = parser.parse_known_args(arguments)
    for option in options:
        if option.split("=")[0] in OWN:
            parser.error(f"{option}: the check sets this itself")
    return args, options


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


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(arguments)
    return cli.run(lambda: execute(args, options))


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


if __name__ == "__main__":
    sys.exit(main())
