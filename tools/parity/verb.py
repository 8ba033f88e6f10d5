"""check: its options. What runs it needs more than the standard library, and is imported then."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import cli
from ..cli import UserError
from . import FORMAT

CHECK = """\
Does a model give the same logits compiled as eager? Runs it in two vLLM engines, each in a process
of its own, on the same samples, with greedy decoding. Options that are not listed here go to both
engines, under vLLM's names.

exit code: 0 they agree, 1 they diverge, 2 the check could not run"""
EXAMPLES = """\
@FILE stands for the arguments in a file, one per line

examples:
  vllm-deepstack check --model Qwen/Qwen3-VL-2B-Instruct --max-model-len 8192
  vllm-deepstack check --model MODEL --samples prompts.jsonl --json report.json"""
# What the check itself decides; given to an engine they would undo it.
OWN = (
    "--enforce-eager",
    "--no-enforce-eager",
    "--logprobs-mode",
    "--max-logprobs",
    "--max_logprobs",
)


def add(verbs: Any) -> None:
    parser = cli.add_verb(
        verbs,
        "check",
        "compare a model compiled with eager, on real engines",
        CHECK,
        EXAMPLES,
        failed=2,
        execute=execute,
        engine_options=True,
        fromfile_prefix_chars="@",
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
        help="JSON to FILE, or to stdout instead of the table; docs/schemas/check.json",
    )
    parser.add_argument(
        "--logs", type=Path, help="keep the engines' logs and results in this folder"
    )


def execute(args: argparse.Namespace) -> int:
    for option in args.options:
        if option.split("=")[0] in OWN:
            args.parser.error(f"{option}: the check sets this itself")
    try:
        from .check import execute
    except ModuleNotFoundError as error:
        raise UserError(
            f"check needs {error.name}: pip install 'vllm-deepstack[check]', beside vLLM"
        ) from None
    return execute(args, args.options)
