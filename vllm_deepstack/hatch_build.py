"""Puts the merged files, the tables and the overlay into the package: from the repository, or from
a source distribution, which holds them. In the repository, those that `make plugin` made are taken,
or else they are made."""

import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TABLES = ("requirements/files.json", "requirements/releases.json")
INCLUDED = (*TABLES, "vllm/model_executor/models", "LICENSE")


class MergedFiles(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            sys.exit("no editable install: call `make plugin`, and install the wheel in dist/")
        root = Path(self.root)
        if (root / "merged").is_dir():
            found = {name: root / name for name in (*INCLUDED, "merged")}
        else:
            found = {name: root.parent / name for name in INCLUDED}
            found["merged"] = merged(root.parent)
        package = "" if self.target_name == "sdist" else "vllm_deepstack/"
        for name, source in found.items():
            build_data["force_include"][str(source)] = package + name


def merged(repository):
    """The folder of the merged files."""
    sys.path.insert(0, str(repository))
    from vllm_deepstack import build
    from vllm_deepstack.patch.tree import OVERLAY, overlay_files

    folder, overlay = repository / "build" / "merged", overlay_files(OVERLAY)
    if not build.is_built(folder, overlay):
        try:
            build.build(folder, overlay)
        except Exception as error:
            sys.exit(
                f"the merged files could not be made: {error}\nThey need the package index, or "
                "DEEPSTACK_SOURCES=FOLDER with vLLM's wheels; `make plugin` makes them ahead"
            )
    return folder
