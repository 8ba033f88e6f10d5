"""Several vLLMs side by side, in one table.

    python -m vllm_deepstack.check.trees OUT_DIR NAME=TREE… -- OPTION…

`NAME=` is the installed vLLM. The options are the check's, and vLLM's. OUT_DIR gets NAME.json, and
the engines' logs. The exit code is the last one's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from .. import cli
from ..__main__ import parser
from .check import check, validate
from .report import exit_code, show_together


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    at = arguments.index("--")
    out, *pairs = arguments[:at]
    trees = {
        name: Path(tree) if tree else None for name, _, tree in (p.partition("=") for p in pairs)
    }
    args, options = parser().parse_known_args(["check", *arguments[at + 1 :]])
    options = ["--model", args.model, *options]
    validate(args, trees.values())
    Path(out).mkdir(parents=True, exist_ok=True)
    reports = check(args, options, trees, Path(out).resolve(), Console(stderr=True))
    for name, report in zip(trees, reports):
        cli.write_json(report, Path(out) / f"{name}.json")
    show_together(dict(zip(trees, reports)), Console(width=cli.width()))
    print(f"{time.monotonic() - began:.0f} seconds")
    return exit_code(reports[-1])


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
