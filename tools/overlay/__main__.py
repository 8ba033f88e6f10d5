"""Merge the fork's definitions into a vLLM source tree, show the change, or take it out.

Exit code: 0, or 1 after an error; of status 0: clean, 1: affected, 2: it cannot tell.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from .. import cli
from ..cli import UserError
from . import PROGRAM
from .status import UNKNOWN, status
from .tree import OVERLAY, Tree


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "verb",
        choices=("status", "diff", "apply", "revert"),
        help="status: say which of the defects it has, found from its code; "
        "diff: print the change as a patch for `git apply`, write nothing; "
        "apply: merge in place, all or nothing; revert: put back the very bytes that were there",
    )
    parser.add_argument(
        "tree",
        type=Path,
        nargs="?",
        help="a folder that contains vllm/: site-packages, an unpacked wheel or sdist, a checkout "
        "(default: that of the installed vLLM)",
    )
    parser.add_argument("--json", action="store_true", help="status as JSON")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="status: the compilation_config.cache_dir that you serve with, if you do: it says "
        "whether compiled graphs from before the patch are in it",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        default=OVERLAY,
        help="the folder whose vllm/ is merged (default: the fork)",
    )
    args = parser.parse_args(arguments)
    for option, given in (("--json", args.json), ("--cache-dir", args.cache_dir)):
        if given and args.verb != "status":
            parser.error(f"{option} is for status")
    return cli.run(lambda: execute(args), failed=UNKNOWN if args.verb == "status" else 1)


def execute(args: argparse.Namespace) -> int:
    root = args.tree or installed()
    if args.verb == "status":
        found = status(root, args.overlay, args.cache_dir)
        print(found.json() if args.json else found.text())
        return found.code
    tree = Tree(root, args.overlay)
    name = f"vLLM {tree.release.version} in {tree.root}"
    if args.verb == "diff":
        for change in tree.changes():
            sys.stdout.writelines(change.diff())
    elif args.verb == "apply":
        changes = tree.apply()
        for change in changes:
            print(f"{'added' if change.before is None else 'merged'} {change.path}")
        print(f"{name}: the overlay is applied" if changes else f"{name}: nothing to change")
    else:
        for path in tree.revert():
            print(f"restored {path}")
        print(f"{name}: as it was before the overlay")
    return 0


def installed() -> Path:
    """The folder of the vLLM that this Python would import."""
    spec = find_spec("vllm")
    if not spec or not spec.origin:
        raise UserError("no vLLM is installed for this Python: name a folder that contains vllm/")
    return Path(spec.origin).parents[1]


if __name__ == "__main__":
    sys.exit(main())
