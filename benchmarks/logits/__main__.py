"""Prints the README's tables of logits on a GPU, from the results beside it.

python -m benchmarks.logits
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h100"
MODES = {
    "default": "vLLM's default",
    "V1": "`VLLM_USE_V2_MODEL_RUNNER=0`",
    "piecewise": "`cudagraph_mode: PIECEWISE`",
    "full": "`cudagraph_mode: FULL`, Triton attention",
    "breakable": "`VLLM_USE_BREAKABLE_CUDAGRAPH=1`",
    "batch-invariant": "`VLLM_BATCH_INVARIANT=1`",
}
MODELS = {
    "geo3k_nano": "Qwen3-VL",
    "qwen3_omni": "Qwen3-Omni",
    "qwen3_vl_2b": "Qwen3-VL-2B's shape",
}
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def of(rows: list[Row], mode: str, model: str, geo3k: bool) -> list[Row]:
    return [
        row
        for row in rows
        if (row["mode"], row["model"], row["what"] == "Geo3K") == (mode, model, geo3k)
    ]


def cell(rows: list[Row]) -> str:
    """`wrong of all, by up to`; not of a test that was not run, or whose engine ended.

    On the release, a test has passed that has failed as it should.
    """
    if not rows or any(row["outcome"] != "passed" for row in rows):
        return "–"
    count = sum(int(row.get("requests") or row["samples"]) for row in rows)
    wrong = sum(row["wrong"] for row in rows)
    largest = max(row["largest"] for row in rows)
    return f"{wrong} of {count}, {f'{largest:.2g}' if largest else 'to the bit'}"


def table(release: str, geo3k: bool) -> list[str]:
    released, fork = read(f"{release}-as-released"), read(release)
    lines = ["| | | as released | this fork |", "| --- | --- | ---: | ---: |"]
    for mode, said in MODES.items():
        for model, name in MODELS.items():
            ours, theirs = (of(rows, mode, model, geo3k) for rows in (fork, released))
            if cell(ours) != "–":
                lines.append(f"| {said} | {name} | {cell(theirs)} | {cell(ours)} |")
    return lines


if __name__ == "__main__":
    print("vLLM 0.33.0, requests that differ from the same request alone, by up to:\n")
    print("\n".join(table("0.33.0", geo3k=False)))
    for release in ("0.22.1", "0.33.0"):
        print(f"\nvLLM {release}, Geo3K samples whose logits differ, compiled to eager:\n")
        print("\n".join(table(release, geo3k=True)))
