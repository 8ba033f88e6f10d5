"""The tests' streams on a GPU and in replay, request by request.

python -m benchmarks.exposure.side_by_side GPU_RESULTS… REPLAY_RESULTS…
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import page

from .streams import STREAMS

IN_REPLAY = {"breakable": "replay", "full-triton": "replay", "default": "replay-decode"}


def wrong(entry: dict[str, Any]) -> set[int]:
    return {number for number, off in enumerate(entry["rows"]) if off > entry["limit"]}


def rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each stream that was served on a GPU: how many requests were wrong there, in
    replay, and in both."""
    streams = [entry for entry in entries if entry["arrivals"] in STREAMS and "rows" in entry]
    by = {(e["model"], e["mode"], e["vllm"], e["arrivals"]): e for e in streams}
    found = []
    for (model, mode, vllm, name), gpu in by.items():
        replay = by.get((model, IN_REPLAY.get(mode, ""), vllm, name))
        if replay:
            ours, theirs = wrong(gpu), wrong(replay)
            counts = [f"{len(each)} of {len(gpu['rows'])}" for each in (ours, theirs)]
            vllms = f"{vllm}, {gpu['version'].split()[0]} and {replay['version'].split()[0]}"
            largest = [f"{max(each['rows']):.2f}" for each in (gpu, replay)]
            line = [model, vllms, f"{mode}, {replay['mode']}", name.replace("-", " ")]
            found.append([*line, *counts, str(len(ours & theirs)), *largest])
    return found


def main(files: list[str]) -> None:
    entries = [entry for file in files for entry in json.loads(Path(file).read_text())["entries"]]
    heads = ["model", "vLLM", "modes", "stream", "GPU", "replay", "same", "GPU by", "replay by"]
    print(page.table(heads, rows(entries)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
