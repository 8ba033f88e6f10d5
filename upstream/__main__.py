"""Write a pull request to vLLM: patches for `git am`, and the text for its description.

The series is for the sources of a release: for one that drops DeepStack features when compiled,
the change of vllm-project/vllm#43617; for a later one, the end of features with their step.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tools import cli, package_index, releases

from .series import Checkout, series
from .text import text

PR = releases.ROOT / "build" / "pr"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m upstream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("release", help="0.33.0")
    parser.add_argument(
        "--output-dir", type=Path, help="default: build/pr/RELEASE; what is there is replaced"
    )
    args = parser.parse_args(arguments)
    return cli.run(lambda: execute(args), failed=1)


def execute(args: argparse.Namespace) -> int:
    release = releases.known(args.release)
    output = args.output_dir or PR / str(release.version)
    sources = package_index.unpack_sources(release, releases.ROOT / "build" / "sdist")
    template = (sources / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    with tempfile.TemporaryDirectory(prefix="pr.", dir=PR.parent) as folder:
        made = Path(folder) / "made"
        checkout = Checkout(Path(folder) / "vllm", sources, release.sources)
        for commit in series(release, sources):
            checkout.commit(commit)
        patches = checkout.patches(made)
        (made / "PULL_REQUEST.md").write_text(text(release, template))
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        made.rename(output)
    for patch in patches:
        print(output / patch)
    print(output / "PULL_REQUEST.md")
    print(f"on vLLM {release.version}: git am --keep-non-patch {output.resolve()}/*.patch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
