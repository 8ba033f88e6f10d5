"""Puts the merged files into the package: those that `make plugin` made, or makes them."""

import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class MergedFiles(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            sys.exit("no editable install: call `make plugin`, and install the wheel in dist/")
        repository = Path(self.root).parent
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
        build_data["force_include"][str(folder)] = "vllm_deepstack/merged"
