"""Pull requests for a release, each an overlay of its own, with its text.

upstream/0.33.0/0-report/…                           a report, which has no patch
                1-clear-deepstack/README.md          title, and the template's sections
                                  vllm/…, tests/…    overlay files, at vLLM's paths
                7-mixin/…                            builds on 1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from vllm_deepstack.cli import UserError
from vllm_deepstack.merge.merge import added, merge

HERE = Path(__file__).parent
# Those that are changes of another's files.
AFTER = {"7-mixin": "1-clear-deepstack", "10-granite-stages": "2-clear-granite"}
# What a new file of vLLM's begins with, and one of an overlay need not.
LICENSE = (
    b"# SPDX-License-Identifier: Apache-2.0\n"
    b"# SPDX-FileCopyrightText: Copyright contributors to the vLLM project\n"
)


@dataclass(frozen=True)
class Pull:
    """A pull request."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def after(self) -> str:
        """The one that has to be merged before."""
        return AFTER.get(self.name, "")

    @property
    def title(self) -> str:
        return self._text.partition("\n")[0].removeprefix("# ")

    @property
    def sections(self) -> dict[str, str]:
        """By heading, in the template's order."""
        parts = re.split(r"^## (.+)\n", self._text, flags=re.MULTILINE)[1:]
        return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))

    @property
    def overview(self) -> str:
        return self.sections["Overview"]

    @property
    def _text(self) -> str:
        return (self.folder / "README.md").read_text()

    def description(self, template: str) -> str:
        """Upstream's template with its sections filled, and what an assistant did disclosed.

        Raises:
            UserError: the template has other sections.
        """
        sections = self.sections
        headings = re.findall(r"^## (.+)$", template, re.MULTILINE)
        if headings != list(sections):
            raise UserError(
                f"{self.folder / 'README.md'}: it has the sections {list(sections)}; upstream's "
                f"template has {headings}"
            )
        filled = re.sub(
            r"^## (.+)\n(?:\s*<!--.*-->\n)?",
            lambda match: f"## {match[1]}\n\n{sections[match[1]]}\n",
            template,
            flags=re.MULTILINE,
        )
        return filled.replace("- [ ] AI assistance", "- [x] AI assistance")

    @property
    def overlay(self) -> dict[str, bytes]:
        """Its files by path."""
        files = sorted(self.folder.rglob("*.py"))
        return {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in files}

    def changes(self, before: Mapping[str, bytes], release: Version) -> dict[str, bytes]:
        """Its files, merged into those of vLLM.

        Raises:
            UserError: a definition or a statement that it names is not there.
        """
        overlay = self.overlay
        return {
            path: merge(ours, before[path], path=path, release=release, overlay=overlay)
            if path in before
            else LICENSE + added(ours, path=path, release=release)
            for path, ours in overlay.items()
        }


def folders(release: Version) -> list[Path]:
    """Those of a release, in the order in which they are sent."""
    return sorted(
        (HERE / str(release)).glob("[0-9]*-*"), key=lambda path: int(path.name.partition("-")[0])
    )


def pulls(release: Version) -> list[Pull]:
    """A pull request has a test."""
    return [Pull(folder) for folder in folders(release) if (folder / "tests").exists()]


def reports(release: Version) -> list[Path]:
    """The folders of reports and issues, which have no patch."""
    return [folder for folder in folders(release) if not (folder / "tests").exists()]
