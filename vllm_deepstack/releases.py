"""The vLLM releases that the fork knows, with the hashes of their files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache

from packaging.version import Version

from . import ROOT
from .cli import UserError

TABLE = ROOT / "requirements" / "releases.json"


@dataclass(frozen=True)
class Release:
    version: Version
    wheels: dict[str, dict[str, str]]
    """Per device, the sha256 of each wheel by its file name."""
    sources: dict[str, str]
    """The sha256 of the files that the overlay changes, by path."""
    requires: dict[str, list[str]]
    """Per device, requirements that replace the metadata's own."""
    sdist: dict[str, str]
    """The sha256 of the source distribution by its file name."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def releases() -> dict[Version, Release]:
    table = json.loads(TABLE.read_text())["releases"]
    return {Version(v): Release(Version(v), **entry) for v, entry in table.items()}


def default() -> Release:
    """The release that the fork is built on."""
    return known(json.loads(TABLE.read_text())["default"])


def known(version: str | Version) -> Release:
    """Raises UserError for a release that is not in the table."""
    table = releases()
    try:
        return table[Version(str(version))]
    except (KeyError, ValueError):
        raise UserError(
            f"unknown vLLM release {version}; known are: {', '.join(map(str, table))}"
        ) from None
