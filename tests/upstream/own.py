"""Upstream's own tests, from a release's sources, on the release as it is and on the fork.

    python -m tests.upstream.own 0.33.0 [--quick]

What passes on the release has to pass on the fork. The tests are those that name a model that the
fork changes, on a CPU; a checkpoint that they take from the hub is a tiny one of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_deepstack import cli, package_index, releases
from vllm_deepstack.cli import UserError
from vllm_deepstack.patch.tree import Tree

BUILD = releases.ROOT / "build"
WORK = BUILD / "upstream"
MODELS = re.compile(
    "deepstack|qwen3.?vl|qwen3.?omni|cohere.?compass|granite.?4.?vision|moss.?audio"
    "|ernie.?4.?5.?vl|models/transformers/multimodal"
    "|models/test_registry|processing/test_common|test_qwen2_5_omni_embed",  # of all, of a base
    re.IGNORECASE,
)
LEFT_OUT = {
    "tests/(kernels|distributed)/": "for GPUs alone",
    "/(entrypoints|evals|generation|generation_ppl_test|lora|pooling|quantization)/"
    "|v1/(determinism|e2e|spec_decode)/": "engines with released checkpoints",
    "tests/multimodal/": "decoding of videos, before any model",
}
QUICK = re.compile("model_executor/test_(?!weight)|processing/test_(?!common)")
# Checkpoints of the hub, and those of tests/tiny_models.py that stand in for them.
HUB = {
    "CohereLabs/North-Micro-Vision-Instruct": "cohere_compass",
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": "qwen3_omni",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3_vl_moe",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
}
# Upstream's tests import these; vLLM does not require them.
NEEDED = ["orjson==3.13.0", "pytest-asyncio==1.5.0", "tblib==3.2.2"]
# Tests that pass on a release, and are not meant to on the fork.
WANTED = {
    "test_processor_video_embeds_with_timestamps": "sends embeddings without their DeepStack "
    "levels, which the fork refuses",
}
REASONS = {
    "repository ID|LocalEntry|HTTPSConnection": "no model hub here",
    "CUDA|GPU|ROCm|Triton|XPU|SM90|accelerator": "no GPU here",
    "`transformers": "for another Transformers",
    "not available online": "no checkpoint, says upstream",
}
Outcomes = dict[str, dict[str, str]]


def uv(*arguments: object) -> None:
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr}")


def environment(version: str, sources: Path) -> Path:
    """The Python that runs a release: this one, or one with what the release requires."""
    if version == str(releases.default().version):
        return Path(sys.executable)
    folder = BUILD / "env" / f"upstream-{version}"
    if not (folder / "complete").exists():
        text = (sources / "requirements/cuda.txt").read_text()  # the CPU's are not on the index
        packages = re.findall(r"^(?:torch|numba)[^#\n]*", text, re.MULTILINE)
        packages += ["pytest", "pytest-timeout", "-r", str(sources / "requirements/common.txt")]
        uv("venv", "--clear", "--python", sys.executable, folder)
        tools = releases.ROOT / "requirements/tools.txt"
        uv("pip", "install", "--python", folder / "bin/python", "-c", tools, *packages)
        (folder / "complete").touch()
    return folder / "bin/python"


def needed() -> Path:
    """A folder for the import path."""
    if not (folder := WORK / "needed").exists():
        uv("pip", "install", "--no-deps", "--target", folder, *NEEDED)
    return folder


def hub() -> Path:
    """A cache of the hub with tiny checkpoints under the released ones' names."""
    from tests import tiny_models

    makers = tiny_models.MODELS | tiny_models.OTHERS
    revision = hashlib.sha1(Path(tiny_models.__file__).read_bytes()).hexdigest()
    for name, tiny in HUB.items():
        model = WORK / "hub/hub" / f"models--{name.replace('/', '--')}"
        if not (model / "snapshots" / revision).exists():
            shutil.rmtree(model, ignore_errors=True)
            (model / "refs").mkdir(parents=True)
            (model / "refs/main").write_text(revision)
            (model / "snapshots").mkdir()
            makers[tiny](model / "part").rename(model / "snapshots" / revision)
    return WORK / "hub"


def files(sources: Path, quick: bool) -> tuple[list[str], dict[str, str]]:
    """The tests that name our models; and those of them that are left out, with the reason."""
    run, left_out = [], {}
    for file in sorted(sources.glob("tests/**/test_*.py")):
        path = str(file.relative_to(sources))
        if MODELS.search(path + file.read_text()):
            why = next((text for part, text in LEFT_OUT.items() if re.search(part, path)), "")
            if why or (quick and not QUICK.search(path)):
                left_out[path] = why or "not in the quick part"
            else:
                run.append(path)
    return run, left_out


def tree(release: releases.Release, folder: Path, fork: bool) -> Path:
    """A copy of a release, with its tests beside it; patched, if it is the fork."""
    sources = package_index.unpack_sources(release, BUILD / "sdist")
    stock = BUILD / "stock" / str(release.version)
    if not stock.exists():
        device = "cpu" if release.wheels["cpu"] else "cuda"
        package_index.unpack(package_index.fetch(release, device, BUILD / "releases"), stock)
    unused = shutil.ignore_patterns("__pycache__", "*.dist-info")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stock, folder, copy_function=os.link, ignore=unused)
    shutil.copytree(sources / "tests", folder / "tests", copy_function=os.link, ignore=unused)
    os.link(sources / "pyproject.toml", folder / "pyproject.toml")
    # By this a vLLM that was built for CUDA, as the newest all are, takes itself for a CPU's.
    (metadata := folder / f"vllm-{release.version}+cpu.dist-info").mkdir()
    (metadata / "METADATA").write_text(f"Name: vllm\nVersion: {release.version}+cpu\n")
    if fork:
        Tree(folder).apply()
    return folder


class Tests:
    """pytest in a tree, in a process of its own."""

    def __init__(self, tree: Path, python: Path, files: list[str]):
        self.name, self.log = tree.name, tree.with_suffix(".log")
        self.file, cache = tree.with_suffix(".jsonl"), tree.with_suffix(".cache")
        self.file.write_text("")
        shutil.rmtree(cache, ignore_errors=True)  # of what vLLM has learnt of the models
        path = os.pathsep.join(map(str, (tree, needed(), Path(__file__).parent)))
        env = {"PYTHONPATH": path, "OUTCOMES": str(self.file), "VLLM_CACHE_ROOT": str(cache)}
        env |= {"VLLM_TARGET_DEVICE": "cpu", "DEEPSTACK_DISABLE": "1"}
        env |= {"HF_HOME": str(hub()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [str(python), "-m", "pytest", "-p", "as_on_a_cpu", "-p", "no:cacheprovider"]
        command += [f"--basetemp={tree.with_suffix('.tmp')}"]  # other runs clean up the shared one
        command += ["--continue-on-collection-errors", "--timeout=300", *files]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=tree, env=os.environ | env, stdout=log, stderr=log
            )

    def lines(self) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outcomes(self) -> Outcomes:
        return {line["test"]: line for line in self.lines() if "test" in line}


def run(jobs: list[Tests], console: Console) -> list[Outcomes]:
    """Waits for them, and says what they do.

    Raises:
        UserError: nothing passes on the first, which is the release.
    """
    stages = dict.fromkeys(jobs, "")
    try:
        with console.status("") as status:
            while any(job.process.poll() is None for job in jobs):
                for job in jobs:
                    done = list(job.outcomes())
                    stage = file_of(done[-1]) if done else "importing"
                    if stage != stages[job] and not console.is_terminal:
                        console.print(f"{job.name}: {stage}", highlight=False)
                    stages[job] = stage
                status.update(", ".join(f"{job.name}: {stage}" for job, stage in stages.items()))
                time.sleep(0.5)
    finally:
        for job in jobs:
            job.process.kill()
    found = [job.outcomes() for job in jobs]
    if jobs[0].process.returncode not in (0, 1) or not passed(found[0]):
        end = "\n".join(jobs[0].log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(f"the release's tests could not be run:\n{end}\nThe log: {jobs[0].log}")
    return found


def file_of(test: str) -> str:
    return test.partition("::")[0]


def passed(outcomes: Outcomes) -> set[str]:
    return {test for test, line in outcomes.items() if line["outcome"] == "passed"}


def lost(release: Outcomes, fork: Outcomes) -> tuple[dict[str, str], dict[str, str]]:
    """What passes on the release and not on the fork, with why: breaches, and wanted ones."""
    breaches, wanted = {}, {}
    for test in sorted(passed(release) - passed(fork)):
        if why := WANTED.get(test.partition("[")[0].rpartition("::")[2]):
            wanted[test] = why
        else:
            breaches[test] = fork[test]["why"] if test in fork else "was not run"
    return breaches, wanted


def reason(why: str) -> str:
    return next((text for words, text in REASONS.items() if re.search(words, why)), why[:90])


def report(release: Outcomes, fork: Outcomes, left_out: dict[str, str], console: Console) -> None:
    counts = [Counter(map(file_of, passed(outcomes))) for outcomes in (release, fork)]
    table = Table("file", "passed on the release", "passed on the fork")
    for file in sorted(counts[0] | counts[1]):
        table.add_row(file, *(str(count[file]) for count in counts))
    table.add_row("total", *(str(count.total()) for count in counts), style="bold")
    console.print(table)
    other = Counter((file_of(t), reason(o["why"])) for t, o in release.items() if o["why"])
    other += Counter((f"{Path(file).parent}/", why) for file, why in left_out.items())
    table = Table("not run on the release, or failed", "tests, or files of a folder", "why")
    for (file, why), count in sorted(other.items()):
        table.add_row(file, str(count), why)
    console.print(table)
    breaches, wanted = lost(release, fork)
    for title, tests in (("not on the fork, and wanted so", wanted), ("NOT ON THE FORK", breaches)):
        for test, why in tests.items():
            console.print(f"{title}: {test}: {why[:500]}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    from benchmarks.machine import machine

    parser = argparse.ArgumentParser(
        prog="python -m tests.upstream.own", description=__doc__.splitlines()[0]
    )
    parser.add_argument("release")
    parser.add_argument("--quick", action="store_true", help="what takes a minute or two")
    args = parser.parse_args(argv)
    console, began = Console(width=cli.width(), markup=False), time.time()
    known = releases.known(args.release)
    version = str(known.version)
    sources = package_index.unpack_sources(known, BUILD / "sdist")
    part = version + "-quick" * args.quick
    trees = [tree(known, WORK / part / name, name == "fork") for name in ("release", "fork")]
    chosen, left_out = files(sources, args.quick)
    python = environment(version, sources)
    jobs = [Tests(tree, python, chosen) for tree in trees]
    release, fork = run(jobs, console)
    report(release, fork, left_out, console)
    breaches, wanted = lost(release, fork)
    result = {"release": version, **machine(), "versions": jobs[0].lines()[0]["versions"]}
    result |= {"seconds": round(time.time() - began), "breaches": breaches, "wanted": wanted}
    result["tests"] = [
        {"test": test, "release": line["outcome"], "fork": fork.get(test, {}).get("outcome")}
        | {"why": line["why"][:300]}
        for test, line in release.items()
    ]
    cli.write_json(result | {"left_out": left_out}, WORK / f"{part}.json")
    return int(bool(breaches))


if __name__ == "__main__":
    sys.exit(cli.run(main))
