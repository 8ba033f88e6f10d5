"""The project's own commands: seconds, and where they go.

`overlay apply` on a copy of a release, `make wheel` once the release is downloaded, and the
parity check with empty caches. Options that are not listed here go to the parity check.

    python -m benchmarks.speed.tools --tree build/stock/0.22.1 --model build/tiny/qwen3_vl …

Exit code: 0, or 2 if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import machine
from tools.releases import ROOT

from . import SpeedError, plots, results

# A line of a command's output that begins with this begins this part.
WHEEL = {
    r"\* Creating isolated environment": "environment",
    r"\* Building wheel|running bdist_wheel": "unpack and merge",
    r"Repacking wheel": "pack",
}
PARITY = {
    r"compiled: importing": "compiled: imports",
    r"compiled: starting": "compiled: start",
    r"compiled: generating": "compiled: generate",
    r"eager: importing": "eager: imports",
    r"eager: starting": "eager: start",
    r"eager: generating": "eager: generate",
    r"eager: done": "compare",
}
APPLY = """
import sys, time
began = time.perf_counter()
from tools.overlay.tree import Tree
imported = time.perf_counter()
Tree(sys.argv[1]).changes()
merged = time.perf_counter()
Tree(sys.argv[1]).apply()
print(imported - began, merged - imported, time.perf_counter() - merged)
"""


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tools",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tree", type=Path, required=True, help="a release as it is installed")
    add("--model", help="the parity check's (default: no parity check)")
    add("--devices", nargs="*", default=["cpu", "cuda"], help="whose wheels are built")
    add("--repeats", type=int, default=3, help="runs of each (default: 3)")
    results.add_output(parser)
    args, options = parser.parse_known_args(arguments)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not (args.tree / "vllm").is_dir():
        parser.error(f"--tree {args.tree}: is no folder that contains vllm/")
    return args, options


def run(command: list[str], parts: dict[str, str], **env: str) -> dict[str, Any]:
    """Seconds of a command and of its parts, by when its lines come.

    Raises:
        SpeedError: it failed, with the end of its output.
    """
    began = last = time.perf_counter()
    found: dict[str, float] = {}
    part, lines = "start", []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        now = time.perf_counter()
        for pattern, label in parts.items():
            if re.match(pattern, line) and label != part:
                found[part] = found.get(part, 0.0) + now - last
                part, last = label, now
    code, now = process.wait(), time.perf_counter()
    found[part] = found.get(part, 0.0) + now - last
    if code:
        end = "".join(lines[-20:])
        raise SpeedError(f"{' '.join(command)} failed with exit code {code}:\n{end}")
    return {"seconds": now - began, "parts": found, "output": "".join(lines)}


def apply(tree: Path) -> dict[str, Any]:
    """The command; then its parts, in a process that does the same and looks at the clock."""
    overlay = [sys.executable, "-m", "tools.overlay"]
    whole = run([*overlay, "apply", str(tree)], {})["seconds"]
    run([*overlay, "revert", str(tree)], {})
    again = run([sys.executable, "-c", APPLY, str(tree)], {})
    run([*overlay, "revert", str(tree)], {})
    imports, merge, both = map(float, again["output"].split())
    parts = {"imports": imports, "merge": merge, "write": both - merge}
    return {
        "seconds": whole,
        "parts": {"start": again["seconds"] - imports - merge - both, **parts},
    }


def median(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {
        part: float(np.median([run["parts"][part] for run in runs])) for part in runs[0]["parts"]
    }
    seconds = [run["seconds"] for run in runs]
    return {"name": name, "seconds": float(np.median(seconds)), "runs": seconds, "parts": parts}


def benchmark(args: argparse.Namespace, options: list[str], progress: Progress) -> dict[str, Any]:
    results.claim(args.output_dir)
    names = ["overlay apply", *(f"make wheel, {device}" for device in args.devices)]
    names += ["parity check"] * bool(args.model)
    task = progress.add_task("", total=len(names) * args.repeats + len(args.devices))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def step(name: str) -> None:
        progress.advance(task)
        progress.update(task, description=name)

    for device in args.devices:
        step(f"downloading, {device}")
        run(["make", "wheel"], {}, VLLM_TARGET_DEVICE=device)
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="speed.", dir=ROOT / "build") as folder:
            step("overlay apply")
            tree = shutil.copytree(args.tree, Path(folder) / "tree", copy_function=os.link)
            runs["overlay apply"].append(apply(tree))
            for device in args.devices:
                step(name := f"make wheel, {device}")
                runs[name].append(run(["make", "wheel"], WHEEL, VLLM_TARGET_DEVICE=device))
            if args.model:
                step("parity check")
                check = [sys.executable, "-m", "tools.parity", "--model", args.model, *options]
                runs["parity check"].append(run(check, PARITY, VLLM_CACHE_ROOT=folder))
    return {
        "benchmark": "tools",
        "parity_options": options,
        "commands": [median(name, each) for name, each in runs.items()],
        "machine": machine(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    console.print(f"on {results.device(result)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("command")
    table.add_column("seconds", justify="right")
    table.add_column("of which")
    for command in result["commands"]:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in command["parts"].items())
        table.add_row(command["name"], f"{command['seconds']:.1f}", parts)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(arguments)
    console = Console(stderr=True)
    try:
        with results.progress(console) as progress:
            result = benchmark(args, options, progress)
    except SpeedError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    results.write(result, args.output_dir / "tools.json")
    plots.tools(result, args.output_dir / "tools.png")
    show(result, Console(width=None if Console().is_terminal else 160))
    return 0


if __name__ == "__main__":
    sys.exit(main())
