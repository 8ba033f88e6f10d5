"""Writes the tables of this folder's README from the results beside it.

python -m benchmarks.speed.page
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results import device, of_which, times

HERE = Path(__file__).parent
SECTION = re.compile(r"(<!-- (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def versions(result: dict[str, Any]) -> str:
    """Under a table: what it was measured on."""
    found = result["machine"]["versions"]
    shown = ", ".join(f"{name} {found[name]}" for name in ("vllm", "torch") if name in found)
    return f"{device(result)}, {shown}."


def serving(result: dict[str, Any]) -> str:
    names = list(result["vllm"])
    by_workload: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        by_workload.setdefault(row["workload"], {})[row["vllm"]] = row
    lines = []
    for workload, row in by_workload.items():
        line = [workload, milliseconds(row[names[0]])]
        for name in names[1:]:
            line.append(f"{milliseconds(row[name])}, {times(row[name]['ratio'])}")
        lines.append(line)
    return table(["ms", *names], lines) + f"\n{result['rounds']} rounds. {versions(result)}\n"


def milliseconds(row: dict[str, Any]) -> str:
    value = 1e3 * row["seconds"]["median"]
    return f"{value:.0f}" if value > 1000 else f"{value:.2f}"


def deepstack(result: dict[str, Any]) -> str:
    names = list(result["vllm"])
    headings = ["hidden, tokens, image share", "floor", "`copy_`, `zero_`"]
    for name in names:
        headings += [name, "× floor", "its kernels", "bytes × floor", "host"]
    lines = []
    for size in result["sizes"]:
        least = size["floor_seconds"]
        line = [f"{size['hidden']}, {size['tokens']}, {size['share']:.0%}"]
        line += [f"{1e6 * least:.1f}", f"{1e6 * size['plain_seconds']:.1f}"]
        for name in names:
            path = size["paths"][name]
            moved = sum(part["bytes"] for part in path["moved"].values())
            line += [
                f"{1e6 * path['seconds']:.1f}",
                f"{path['seconds'] / least:.2f}",
                f"{1e6 * path['busy_seconds']:.1f}",
                f"{moved / size['floor_bytes']:.2f}",
                f"{1e6 * path['host_seconds']:.0f}",
            ]
        lines.append(line)
    bandwidth = f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    return table(headings, lines) + f"\nµs; a large copy moves {bandwidth}. {versions(result)}\n"


def tools(result: dict[str, Any]) -> str:
    lines = [
        [command["name"], f"{command['seconds']:.1f}", of_which(command)]
        for command in result["commands"]
    ]
    return table(["", "seconds", "of which"], lines) + f"\n{versions(result)}\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "serving": serving,
    "deepstack": deepstack,
    "tools": tools,
}


def filled(page: str) -> str:
    """The page with each section `<!-- FILE -->` filled from `results/FILE`."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((HERE / "results" / match[2]).read_text())
        return match[1] + "\n" + TABLES[result["benchmark"]](result) + "\n" + match[3]

    return SECTION.sub(section, page)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text()))
