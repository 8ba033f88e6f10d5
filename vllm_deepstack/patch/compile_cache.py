"""Compiled graphs from before the fix, where vLLM would not notice that its code has changed.

It does notice as a rule: in its own cache every graph is checked against, or filed under, the
source that it was made from. Not so in the two cases here (vllm/compilation/decorators.py,
backends.py, from 0.20.0 to 0.33.0).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def warnings(patched: float, cache_dir: Path | None) -> list[str]:
    """What graphs older than `patched`, seconds since the epoch, would do to an engine.

    `cache_dir` is the `compilation_config.cache_dir` that engines are given, if they are.
    """
    found = []
    graphs = cache_root() / "torch_compile_cache" / "torch_aot_compile"
    if os.environ.get("VLLM_FORCE_AOT_LOAD") == "1" and older(graphs.glob("*/*/model"), patched):
        found.append(
            f"{graphs} has graphs from before the fix, and VLLM_FORCE_AOT_LOAD=1 forbids to "
            "recompile: engines will not start; unset it once, or delete them"
        )
    if cache_dir and older(cache_dir.glob("rank_*/**/vllm_compile_cache.py"), patched):
        found.append(
            f"{cache_dir} has graphs from before the fix, and vLLM takes what is in a cache_dir "
            "that it is given: delete them"
        )
    return found


def older(files: Iterable[Path], than: float) -> bool:
    return any(file.stat().st_mtime < than for file in files)


def cache_root() -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm")
    # As vLLM does: where there is no home, the folder is below the current one.
    return Path(os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT") or default)).absolute()
