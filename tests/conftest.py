"""What the tests share: releases' sources, the stock release, the tiny models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tools import releases

BUILD = releases.ROOT / "build"

# For tests that are meant to fail: it does not matter on how small an example.
settings.register_profile("unshrunk", phases=[Phase.generate])


@pytest.fixture(scope="session")
def release_sources(tmp_path_factory):
    """Copies of the files that the overlay changes, as a release has them: `sources("0.22.1")`."""

    def copy(version: str) -> Path:
        kept = BUILD / "sources" / version
        releases.fetch_sources(releases.known(version), kept)
        return Path(shutil.copytree(kept, tmp_path_factory.mktemp(version), dirs_exist_ok=True))

    return copy


@pytest.fixture(scope="session")
def stock_tree() -> Path:
    """The stock release that the fork is built on, unpacked. Not to be written to."""
    release = releases.default()
    tree = BUILD / "stock" / str(release.version)
    if not tree.exists():
        releases.unpack(release.fetch("cpu", BUILD / "releases"), tree)
    return tree
