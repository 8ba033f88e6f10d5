"""Imports what `apply` leaves when it is killed: the first so many of the merged files.

    python -m tests.overlay.prefixes TREE [backwards]

`TREE` has the vLLM that is imported. `backwards` is the order in which it would not do. Prints a
line for each number of files that are merged: what the modules that cannot be imported then raise,
by module.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_deepstack.merged import module_of, table
from vllm_deepstack.patch.tree import Tree, in_order


class Merged(MetaPathFinder):
    def __init__(self, files: dict[str, Path]):
        self.files = files

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.files[name]) if name in self.files else None


def raised(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except BaseException as error:
        return repr(error)
    return None


def main(tree: Path, backwards: bool) -> None:
    plan = {one.path: one for one in Tree(tree).plan() if one.after != one.upstream}
    modules = [module_of(path) for path in table().files if (tree / path).is_file()]
    # All that they import and that is not merged: once, and not in each child.
    import vllm.model_executor.models.interfaces
    import vllm.model_executor.models.qwen2_5_vl
    import vllm.model_executor.models.utils  # noqa: F401

    order = in_order(plan)[:: -1 if backwards else 1]
    with TemporaryDirectory() as folder:
        files = {}
        for number, path in enumerate(order):
            file = Path(folder, str(number), Path(path).name)
            file.parent.mkdir()
            file.write_bytes(plan[path].after)
            files[module_of(path)] = file
        loaded = [name for name in files if name in sys.modules]
        assert not loaded, loaded
        for count in range(len(files) + 1):
            sys.stdout.flush()
            if not os.fork():
                sys.meta_path.insert(0, Merged(dict(list(files.items())[:count])))
                found = {module: why for module in modules if (why := raised(module))}
                print(json.dumps(found), flush=True)
                os._exit(0)
            os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), len(sys.argv) > 2)
