"""check: its options. What runs it needs more than the standard library, and is imported then."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .. import cli
from ..cli import UserError
from . import FORMAT
from .modes import FULL, MODES, PIECEWISE, REPLAYS

CHECK = """\
Is a model right when it is compiled? Runs it in vLLM engines, each in a process of its own: eager,
and in each of the modes. Does it compute the same? Does a request get the same after others as
alone? Do images change its logits? The engines are those of your own `vllm serve` line, behind
`--`; or name the model, and add options of `vllm serve`. Or, with --url, asks a server that runs,
and starts no engine.

exit code: 0 it agrees, 1 it diverges or leaks, 2 the check could not run, or cannot tell; with
--url: 0 nothing seen, 1 it leaks or differs from the reference, 2 the same"""
EXAMPLES = """\
@FILE stands for the arguments in a file, one per line

examples:
  vllm-deepstack check -- vllm serve Qwen/Qwen3-VL-2B-Instruct --max-model-len 8192 --port 8000
  vllm-deepstack check --model Qwen/Qwen3-VL-2B-Instruct --max-model-len 8192
  vllm-deepstack check --model MODEL --modes default breakable batch-invariant --html check.html
  vllm-deepstack check --model MODEL --samples prompts.jsonl --json report.json
  vllm-deepstack check --url http://localhost:8000"""
# What the check itself decides; given to an engine they would undo it.
OWN = ("--enforce-eager", "--no-enforce-eager", "--logprobs-mode", "--max-logprobs")
NAMES = [mode.name for mode in MODES]
# Options that are for a server alone, and for engines alone.
OF_SERVERS = ["reference_url", "api_key"]
OF_ENGINES = ["samples", "num_samples", "max_tokens", "modes", "dtype", "vllm", "reference"]
OF_ENGINES += ["max_kl", "side_by_side", "html", "junit", "logs"]
REPLAYED = {mode.name for mode in REPLAYS}  # by a worker extension
GRAPHS = {PIECEWISE.name, FULL.name}  # they are a compilation config


def add(verbs: Any) -> None:
    parser = cli.add_verb(
        verbs,
        "check",
        "is a model right when compiled: against eager, and what leaks, on real engines",
        CHECK,
        EXAMPLES,
        failed=2,
        execute=execute,
        engine_options=True,
        fromfile_prefix_chars="@",
    )
    parser.add_argument(
        "--model",
        help="a checkpoint's folder, or its name on the hub; with --url, the name that is served "
        "(default: the server's first)",
    )
    parser.add_argument("--samples", type=Path, help=f"JSON lines (default: built in); {FORMAT}")
    parser.add_argument(
        "--num-samples", type=cli.positive, help="how many samples (default: all; 5 built-in ones)"
    )
    parser.add_argument(
        "--max-tokens", type=cli.positive, default=8, help="tokens a sample (default: 8)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=NAMES,
        help="how vLLM compiles and runs it (default: default; on a CPU, also replay and "
        f"replay-decode): {', '.join(NAMES)}",
        metavar="MODE",
    )
    parser.add_argument("--dtype", help="as vLLM has it (default: auto)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest |Δlogit| that is agreement (default: by dtype); with --url, largest "
        "|Δ log-probability| (default: 0.1)",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="TREE",
        help="a folder that contains another vllm/ than the installed one",
    )
    parser.add_argument("--reference", action="store_true", help="compare with Transformers, too")
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="with --reference: the largest mean KL to Transformers, over all samples' tokens, "
        "that is agreement (default: any)",
    )
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="two engines at once, with half the memory each and, on a CPU, half the cores",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="JSON to FILE, or to stdout instead of the table; docs/schemas/check.json",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with plots")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="JUnit XML, for a CI")
    parser.add_argument(
        "--timeout",
        type=cli.positive,
        metavar="SECONDS",
        help="of each engine, its start included (default: 3600); with --url, of a request "
        "(default: 60)",
    )
    parser.add_argument(
        "--logs", type=Path, help="keep the engines' logs and results in this folder"
    )
    server = parser.add_argument_group("a server that runs")
    server.add_argument(
        "--url", help="http://HOST:PORT; sends it some 100 requests, at most 4 at once"
    )
    server.add_argument("--reference-url", metavar="URL", help="a server to compare with, too")
    server.add_argument(
        "--api-key", metavar="KEY", help="sent to both (default: the environment's OPENAI_API_KEY)"
    )


def execute(args: argparse.Namespace) -> int:
    for name in OF_ENGINES if args.url else OF_SERVERS:
        if getattr(args, name) != args.parser.get_default(name):
            why = "not with --url, which starts no engine" if args.url else "only with --url"
            args.parser.error(f"--{name.replace('_', '-')}: {why}")
    if args.url and (given := [*args.options, *args.line]):
        args.parser.error(f"{given[0]}: not with --url, which starts no engine")
    if args.max_kl is not None and not args.reference:
        args.parser.error("--max-kl: only with --reference")
    asked = set(args.modes or ())
    if not args.url:
        args.options = line_of(args)
    for option in args.options:
        # vLLM takes `_` for `-`, and the beginning of a name for the name.
        name = option.split("=")[0].replace("_", "-")
        if name.startswith("--") and any(own.startswith(name) for own in OWN):
            args.parser.error(f"{option}: the check sets this itself")
        if REPLAYED & asked and name.startswith("--worker-ext"):
            args.parser.error(f"{option}: --modes replay and replay-decode set this themselves")
        if GRAPHS & asked and re.match(r"(-O|-cc|--compilation[-_]config)\b", option):
            args.parser.error(f"{option}: --modes piecewise and full set this themselves")
    try:
        if args.url:
            from .url import execute as ask

            return ask(args)
        from .check import execute

        if args.html:
            from . import page  # noqa: F401
        if args.junit:
            from . import junit  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"check needs {error.name}: "
            "pip install junitparser matplotlib numpy pillow rich, beside vLLM"
        ) from None
    return execute(args, args.options)


def line_of(args: argparse.Namespace) -> list[str]:
    """What follows `vllm serve`."""
    if not args.line:
        if not args.model:
            args.parser.error(
                "name the model: --model, `-- vllm serve MODEL …`, or a server: --url"
            )
        return ["--model", args.model, *args.options]
    if args.line[:2] != ["vllm", "serve"] or args.model or args.options:
        args.parser.error(
            "behind `--`, give the whole line: `-- vllm serve MODEL …`; before it, the check's own "
            f"options alone (not {' '.join([*args.options, *args.line][:1])})"
        )
    return args.line[2:]
