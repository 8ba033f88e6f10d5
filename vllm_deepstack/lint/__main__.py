#!/usr/bin/env python3
"""`vllm-deepstack lint` of a clone that is not installed: for pre-commit."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from vllm_deepstack import cli  # noqa: E402
from vllm_deepstack.lint import verb  # noqa: E402

parser = argparse.ArgumentParser(prog="vllm-deepstack")
verb.add(parser.add_subparsers(required=True))
args = parser.parse_args(["lint", *sys.argv[1:]])
sys.exit(cli.run(lambda: args.execute(args), failed=2))
