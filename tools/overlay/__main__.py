"""Merge the fork's definitions into a vLLM source tree, show the change, or take it out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import OverlayError
from .tree import OVERLAY, Tree


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.overlay", description=__doc__)
    parser.add_argument(
        "verb",
        choices=("diff", "apply", "revert"),
        help="diff: print the change as a patch for `git apply`, write nothing; "
        "apply: merge in place, all or nothing; revert: put back the very bytes that were there",
    )
    parser.add_argument(
        "tree",
        type=Path,
        help="a folder that contains vllm/: site-packages, an unpacked wheel or sdist, a checkout",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        default=OVERLAY,
        help="the folder whose vllm/ is merged (default: the fork)",
    )
    args = parser.parse_args(arguments)
    try:
        tree = Tree(args.tree, args.overlay)
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
    except OverlayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
