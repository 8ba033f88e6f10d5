"""Makes the merged files that the package holds.

    python -m vllm_deepstack.build FOLDER

Each original is fetched from the package index by its sha256, unless DEEPSTACK_SOURCES names a
folder that has releases: their wheels, or folders that contain vllm/.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.version import Version
from rich.progress import track

from . import ROOT, cli, package_index, releases
from .cli import UserError
from .merge.merge import merged_file
from .merged import NONE, TABLE, File, is_built, replaced, stamp
from .patch.tree import OVERLAY, overlay_files


def build(folder: Path, overlay: Mapping[str, bytes]) -> None:
    """All merged files of the table, or none.

    Raises:
        UserError: an original could not be had, or the table is of another overlay.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        quiet = not sys.stderr.isatty()
        for sha, file in track(replaced(), "merging", transient=True, disable=quiet):
            theirs = None if sha == NONE else original(file, sha)
            version = Version(file.release)
            ours = overlay[file.path]
            data = merged_file(ours, theirs, path=file.path, release=version, overlay=overlay)
            if releases.sha256(data) != file.merged:
                raise UserError(
                    f"{TABLE}: {file.path} of vLLM {file.release}: the overlay makes something "
                    "else of it; `python -m tests.overlay.files` writes the table anew"
                )
            place = file.place_in(made)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
        (made / "stamp").write_text(stamp(overlay))
        made.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def original(file: File, sha: str) -> bytes:
    if named := os.environ.get("DEEPSTACK_SOURCES"):
        for data in candidates(Path(named), file.path):
            if releases.sha256(data) == sha:
                return data
        raise UserError(
            f"DEEPSTACK_SOURCES={named}: no wheel and no folder there has {file.path} as vLLM "
            f"{file.release} has it"
        )
    kept = ROOT / "build" / "sources" / file.release
    package_index.fetch_sources(releases.known(file.release), kept)
    return (kept / file.path).read_bytes()


def candidates(folder: Path, path: str) -> Iterator[bytes]:
    for tree in (folder, *folder.glob("*/")):
        if (tree / path).is_file():
            yield (tree / path).read_bytes()
    for wheel in folder.glob("vllm*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if path in archive.namelist():
                yield archive.read(path)


def main() -> int:
    (folder,) = map(Path, sys.argv[1:])
    overlay = overlay_files(OVERLAY)
    if not is_built(folder, overlay):
        build(folder, overlay)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, failed=1))
