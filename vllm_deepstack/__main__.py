"""Fixes DeepStack models (Qwen3-VL, Qwen3-Omni and others) in an installed vLLM, and checks models.

As a plugin it needs no command: once vllm-deepstack is installed, vLLM loads it.
"""

from __future__ import annotations

import argparse
import sys

from . import __version__, cli


def parser() -> argparse.ArgumentParser:
    from .check import verb as check
    from .lint import verb as lint
    from .patch import verbs as patch  # here: LibCST takes a while, and Ctrl-C may come

    whole = argparse.ArgumentParser(
        prog="vllm-deepstack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`vllm-deepstack VERB --help` has the options of a verb, and examples",
    )
    whole.add_argument("--version", action="version", version=f"vllm-deepstack {__version__}")
    verbs = whole.add_subparsers(title="verbs", metavar="VERB", required=True)
    patch.add(verbs)
    check.add(verbs)
    lint.add(verbs)
    return whole


def main(arguments: list[str] | None = None) -> int:
    return cli.run(lambda: execute(arguments))


def execute(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    args, options = parser().parse_known_args(arguments[:at])
    line = arguments[at + 1 :]
    if not args.engine_options and (options or line):
        args.parser.error(f"unrecognized arguments: {' '.join([*options, *line])}")
    args.options, args.line = options, line
    return cli.run(lambda: args.execute(args), failed=args.failed)


if __name__ == "__main__":
    sys.exit(main())
