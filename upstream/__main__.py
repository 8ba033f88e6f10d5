"""Write pull requests to vLLM: patches for `git am`, and the texts of their descriptions.

For 0.33.0: several small ones, reports, of which one is private and goes first, and how to send
them. For a release before 0.23: a backport, a branch for those who maintain that release.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from packaging.version import Version

from vllm_deepstack import cli, package_index, releases
from vllm_deepstack.cli import UserError

from . import backport
from .checkout import Checkout, Commit
from .pulls import HERE, pulls, reports

PR = releases.ROOT / "build" / "pr"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m upstream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("release", help="0.33.0, or one before 0.23")
    parser.add_argument(
        "--output-dir", type=Path, help="default: build/pr/RELEASE; what is there is replaced"
    )
    args = parser.parse_args(arguments)
    return cli.run(lambda: execute(args), failed=1)


def execute(args: argparse.Namespace) -> int:
    release = releases.known(args.release)
    output = args.output_dir or PR / str(release.version)
    if not pulls(release.version) and release.version >= Version("0.23"):
        written = [folder.name for folder in HERE.glob("[0-9]*") if pulls(Version(folder.name))]
        raise UserError(
            f"vLLM {release.version} has no pull requests: they are for {', '.join(written)}, the "
            "backport for releases before 0.23"
        )
    sources = package_index.unpack_sources(release, releases.ROOT / "build" / "sdist")
    PR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pr.", dir=PR) as folder:
        made = Path(folder) / "made"
        write = write_pulls if pulls(release.version) else write_backport
        write(release, sources, Path(folder) / "vllm", made)
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        made.rename(output)
    for file in sorted(output.rglob("*")):
        if file.is_file():
            print(file)
    return 0


def write_pulls(release: releases.Release, sources: Path, root: Path, made: Path) -> None:
    """`SEND.md`, reports, and of each pull request its patch and its description."""
    made.mkdir()
    shutil.copy(HERE / str(release.version) / "SEND.md", made)
    for report in reports(release.version):
        shutil.copytree(report, made / report.name)
    template = (sources / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    paths = {path for pull in pulls(release.version) for path in pull.overlay}
    there = [path for path in sorted(paths) if (sources / path).is_file()]
    checkout = Checkout(root, sources, there)
    for pull in pulls(release.version):
        start = pull.after or "main"
        checkout.branch(pull.name, start)
        before = {path: (root / path).read_bytes() for path in paths if (root / path).is_file()}
        changes = pull.changes(before, release.version)
        checkout.commit(Commit(pull.title, textwrap.fill(pull.overview, 72), changes))
        checkout.patches(made / pull.name, start)
        (made / pull.name / "PULL_REQUEST.md").write_text(pull.description(template))


def write_backport(release: releases.Release, sources: Path, root: Path, made: Path) -> None:
    checkout = Checkout(root, sources, release.sources)
    checkout.branch("deepstack-backport", "main")
    for commit in backport.series(release, sources):
        checkout.commit(commit)
    checkout.patches(made / "backport", "main")
    shutil.copy(HERE / "0.22.1" / "README.md", made / "backport")


if __name__ == "__main__":
    sys.exit(main())
