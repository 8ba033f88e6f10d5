"""Prints tables of logits on a GPU, from the results beside it; some are the README's.

python -m benchmarks.logits
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CARDS = ("H100", "H200")  # in the order in which they ran
MODES = {
    "default": "vLLM's default",
    "V1": "`VLLM_USE_V2_MODEL_RUNNER=0`",
    "piecewise": "`cudagraph_mode: PIECEWISE`",
    "full, Triton": "`cudagraph_mode: FULL`, Triton attention",
    "breakable": "`VLLM_USE_BREAKABLE_CUDAGRAPH=1`",
    "batch-invariant": "`VLLM_BATCH_INVARIANT=1`",
}
MODELS = {
    "geo3k_nano": "Qwen3-VL",
    "qwen3_omni": "Qwen3-Omni",
    "qwen3_vl_2b": "Qwen3-VL-2B's shape",
}
STREAMS = ("images then texts", "image ends prompt", "image trickles")
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """Of `NAME.json`, and `NAME.2.json`, …: of a test that ran again, the last run."""
    rows: list[Row] = []
    for card in CARDS:
        files = (RESULTS / card.lower()).glob(f"{name}.*json")
        for file in sorted(files, key=lambda file: (len(file.name), file)):
            again = [row | {"card": card} for row in json.loads(file.read_text())["rows"]]
            tests = {row["test"] for row in again}
            rows = [row for row in rows if row["test"] not in tests] + again
    return rows


def others(name: str) -> list[str]:
    """The other tests, as Markdown: of random streams, of other models, of the check."""
    lines = [
        "| test | | requests | wrong | by up to | on |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in read(name):
        file, _, test = row["test"].partition("::")
        if not file.endswith(("test_logits.py", "test_gpu_leaks.py")) and "largest" in row:
            figures = [row["requests"] or "–", row.get("wrong", "–"), f"{row['largest']:.2g}"]
            cells = [f"`{test}`", row["outcome"], *figures, row["card"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def of(rows: list[Row], mode: str, model: str, geo3k: bool) -> list[Row]:
    file = "tests/geo3k/test_logits.py" if geo3k else "tests/serving/test_gpu_leaks.py"
    return [
        row
        for row in rows
        if (row.get("mode"), row.get("model")) == (mode, model) and row["test"].startswith(file)
    ]


def cell(rows: list[Row], count: int) -> str:
    """`wrong of all, by up to`, and the card if it is not the first; `–` of what was not run, or
    whose engine ended."""
    if len(rows) < count:
        return "–"
    requests = sum(int(row.get("requests") or row["samples"]) for row in rows)
    wrong = sum(row["wrong"] for row in rows)
    largest = max(row["largest"] for row in rows)
    cards = {row["card"] for row in rows} - {CARDS[0]}
    where = f" ({', '.join(cards)})" if cards else ""
    return f"{wrong} of {requests}, {f'{largest:.2g}' if largest else 'bit-identical'}{where}"


def table(release: str, model: str, geo3k: bool) -> list[str]:
    """Of one model, as Markdown. On the release, a test has passed that failed as it should."""
    released, fork = read(f"{release}-as-released"), read(release)
    count = 1 if geo3k or model == "qwen3_vl_2b" else len(STREAMS)
    lines = [f"| vLLM {release} | as released | this fork |", "| --- | ---: | ---: |"]
    for mode, said in MODES.items():
        cells = [cell(of(rows, mode, model, geo3k), count) for rows in (released, fork)]
        if cells != ["–", "–"]:
            lines.append(f"| {said} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    for model, name in MODELS.items():
        print(f"\n{name}: requests that differ from the same request alone, and by up to\n")
        print("\n".join(table("0.33.0", model, geo3k=False)))
        for release in ("0.22.1", "0.33.0"):
            if model != "qwen3_vl_2b":
                print(f"\n{name}: Geo3K-nano samples, compiled to eager\n")
                print("\n".join(table(release, model, geo3k=True)))
    for name in ("0.33.0", "0.33.0-plugin", "0.33.0-as-released", "0.22.1", "0.22.1-as-released"):
        print(f"\nvLLM {name.replace('-', ', ', 1)}: other tests\n")
        print("\n".join(others(name)))
