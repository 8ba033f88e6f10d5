"""The project's own commands: seconds, and where they go.

What the plugin adds to a process, `overlay apply` on a copy of a release, `make wheel` once the
release is downloaded, and the check with empty caches. Options that are not listed here go to the
check.

    python -m benchmarks.speed.tools --tree build/stock/0.22.1 --model build/tiny/qwen3_vl …

Exit code: 0, or 2 if a command failed.
"""

from __future__ import annotations

import argparse
import os
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
from vllm_deepstack import ROOT, cli
from vllm_deepstack.cli import UserError
from vllm_deepstack.patch.tree import Tree

from . import plots, results

# Where a line of a command's output begins so, a part of it begins. Engines start side by
# side, and the compiled one takes longest.
WHEEL = {
    "* Creating isolated environment": "environment",
    "running bdist_wheel": "check the release",
    "Unpacking to": "unpack",
    "Repacking wheel": "merge and pack",
}
PARITY = {
    "default: importing": "imports",
    "default: starting": "start the engine",
    "default: asking": "generate",
    "default: done": "compare",
}
IMPORT = """
import sys, time
began = time.perf_counter()
from pathlib import Path
from vllm_deepstack.patch.tree import Tree
imported = time.perf_counter()
Tree(Path(sys.argv[1])).{call}()
print(imported - began, time.perf_counter() - imported)
"""
# Served to an engine of Qwen3-VL; vLLM has imported PyTorch before. Where `pip` has not compiled
# these, each process does, since no bytecode is written.
PLUGIN = """
import sys, time
import torch
began = time.perf_counter()
import vllm_deepstack.plugin
imported = time.perf_counter()
for name in ("qwen3_vl", "deepstack"):
    spec = sys.meta_path[0].find_spec(f"vllm.model_executor.models.{name}")
    compile(spec.loader.get_source(spec.name), spec.origin, "exec")
print(imported - began, time.perf_counter() - imported)
"""
# What `apply` cannot do without.
LEAST = """
import sys
from pathlib import Path
import libcst
for file in sys.argv[1:]:
    libcst.parse_module(Path(file).read_bytes())
"""


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tools",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE stands for the arguments in a file, one per line",
    )
    add = parser.add_argument
    add("--tree", type=Path, required=True, help="a release as it is installed")
    add("--model", help="the check's (default: no check)")
    add("--devices", nargs="*", default=["cpu", "cuda"], help="whose wheels are built")
    add("--repeats", type=cli.positive, default=3, help="runs of each (default: 3)")
    results.add_output(parser)
    args, options = parser.parse_known_args(arguments)
    if not (args.tree / "vllm").is_dir():
        parser.error(f"--tree {args.tree}: does not contain vllm/")
    return args, options


def run(command: list[str], parts: dict[str, str], **env: str) -> dict[str, Any]:
    """Seconds of a command and of its parts, by when its lines begin.

    Raises:
        UserError: it failed, with the end of its output.
    """
    began = last = time.perf_counter()
    found: dict[str, float] = {}
    part, output = "Python", ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    while piece := os.read(process.stdout.fileno(), 2**16):
        output += piece.decode(errors="replace")
        now = time.perf_counter()
        line = max(output.rfind("\n" + mark) for mark in parts) + 1 if parts else 0
        for mark, label in parts.items():
            if line and output.startswith(mark, line) and label != part:
                found[part] = found.get(part, 0.0) + now - last
                part, last = label, now
    code, now = process.wait(), time.perf_counter()
    found[part] = found.get(part, 0.0) + now - last
    if code:
        end = "\n".join(output.splitlines()[-20:])
        raise UserError(f"{' '.join(command)} failed with exit code {code}:\n{end}")
    return {"seconds": now - began, "parts": found, "output": output}


def apply(tree: Path, repeats: int = 5) -> dict[str, Any]:
    """The command; then its parts, in processes that do the same and look at the clock."""
    overlay = [sys.executable, "-m", "vllm_deepstack"]
    whole: list[float] = []
    least: list[float] = []
    files = [str(root / path) for path in Tree(tree).overlay for root in (ROOT, tree)]
    files = [file for file in files if Path(file).exists()]
    seconds: dict[str, list[list[float]]] = {"changes": [], "apply": []}
    for _ in range(repeats):
        least.append(run([sys.executable, "-c", LEAST, *files], {})["seconds"])
        whole.append(run([*overlay, "apply", str(tree)], {})["seconds"])
        run([*overlay, "revert", str(tree)], {})
        for call, found in seconds.items():
            command = [sys.executable, "-c", IMPORT.format(call=call), str(tree)]
            found.append([float(text) for text in run(command, {})["output"].split()])
        run([*overlay, "revert", str(tree)], {})
    imports, merge = np.median(seconds["changes"], axis=0)
    write = np.median(seconds["apply"], axis=0)[1] - merge
    rest = np.median(whole) - imports - merge - write
    parts = {"Python": rest, "imports": imports, "merge": merge, "write": write}
    return {
        "seconds": float(np.median(whole)),
        "least_seconds": float(np.median(least)),
        "parts": {name: float(part) for name, part in parts.items()},
    }


def plugin(tree: Path, repeats: int = 5) -> dict[str, Any]:
    """What a process that starts takes longer."""
    path = os.pathsep.join([str(tree.resolve()), str(ROOT)])
    env = {"PYTHONPATH": path, "DEEPSTACK_DISABLE": "0"}
    seconds = []
    for _ in range(repeats):
        output = run([sys.executable, "-c", PLUGIN], {}, **env)["output"]
        seconds.append([float(text) for text in output.split()])
    parts = dict(zip(("import", "find and compile"), map(float, np.median(seconds, axis=0))))
    return {"seconds": sum(parts.values()), "parts": parts}


def median(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {
        part: float(np.median([run["parts"][part] for run in runs])) for part in runs[0]["parts"]
    }
    seconds = [run["seconds"] for run in runs]
    told = {"name": name, "seconds": float(np.median(seconds)), "runs": seconds, "parts": parts}
    least = [run["least_seconds"] for run in runs if "least_seconds" in run]
    return told | ({"least_seconds": float(np.median(least))} if least else {})


def benchmark(args: argparse.Namespace, options: list[str], progress: Progress) -> dict[str, Any]:
    results.claim(args.output_dir)
    names = ["plugin", "overlay apply"]
    names += [f"make wheel, {device}" for device in args.devices]
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
            step("plugin")
            runs["plugin"].append(plugin(args.tree))
            step("overlay apply")
            tree = shutil.copytree(args.tree, Path(folder) / "tree", copy_function=os.link)
            runs["overlay apply"].append(apply(tree))
            for device in args.devices:
                step(name := f"make wheel, {device}")
                runs[name].append(run(["make", "wheel"], WHEEL, VLLM_TARGET_DEVICE=device))
            if args.model:
                step("parity check")
                check = [sys.executable, "-m", "vllm_deepstack", "check", "--model", args.model]
                check += ["--modes", "default", *options]
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
        table.add_row(command["name"], f"{command['seconds']:.1f}", results.of_which(command))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    args, options = parse(arguments)
    return cli.run(lambda: execute(args, options))


def execute(args: argparse.Namespace, options: list[str]) -> int:
    with results.progress(Console(stderr=True)) as progress:
        result = benchmark(args, options, progress)
    cli.write_json(result, args.output_dir / "tools.json")
    plots.tools(result, args.output_dir / "tools.png")
    show(result, Console(width=cli.width(160)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
