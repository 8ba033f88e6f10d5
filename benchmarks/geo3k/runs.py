"""What is run: engines and Transformers, each in a process of its own, and endpoints."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_deepstack.check.processes import Job, engine_job, import_path, stopping
from vllm_deepstack.cli import UserError

from .answers import Answered, Asked, read
from .client import serve_run
from .data import Question

MODES = ("eager", "compiled", "transformers")
SERVED = "served"


@dataclass(frozen=True)
class Run:
    """`eager`, `compiled`, `eager@TREE`, `compiled@TREE`, `transformers`, or `served`."""

    name: str
    mode: str
    tree: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Run:
        mode, _, tree = text.partition("@")
        if mode not in MODES or (tree and mode == "transformers"):
            raise UserError(
                f"--runs {text}: a run is eager, compiled or transformers; eager@TREE and "
                "compiled@TREE are of the vLLM in TREE"
            )
        if tree and not Path(tree, "vllm", "__init__.py").is_file():
            raise UserError(f"--runs {text}: no vLLM there: it has no vllm/__init__.py")
        name = re.sub(r"[^\w.@+-]", "_", f"{mode}@{Path(tree).name}" if tree else mode)
        return cls(name, mode, Path(tree) if tree else None)


@dataclass
class Outcome:
    """What a run gave."""

    run: Run
    meta: dict[str, Any]
    answers: list[Answered]


def prepare(questions: list[Question], folder: Path, blank: bool, console: Console) -> list[Asked]:
    """Writes the images where workers find them; white ones of the same sizes if `blank`."""
    (folder / "images").mkdir(exist_ok=True)
    asked = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for question in progress.track(questions, description="images"):
            paths = []
            for k, image in enumerate(question.images):
                path = (folder / "images" / f"{question.number}-{k}.png").resolve()
                shown = Image.new("RGB", image.size, "white") if blank else image
                shown.save(path)
                paths.append(str(path))
            asked.append(Asked(question.number, question.content(paths), question.answer))
    return asked


def fingerprint(questions: list[Question]) -> str:
    """Of texts and pixels: answers to other questions are not to be mixed with these."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.problem}\n{question.answer}\n".encode())
        for image in question.images:
            digest.update(image.tobytes())
    return digest.hexdigest()


def claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder, or finds it to be, one of these settings.

    Raises:
        UserError: it has answers that were given under others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if overwrite:
        for old in (*folder.glob("*.jsonl"), *folder.glob("*.json")):
            old.unlink()
    if file.exists():
        before = json.loads(file.read_text())
        differing = [key for key in settings if before.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"--output-dir {folder} has answers of another evaluation: its {key} is "
                f"{before.get(key)!r}, not {settings[key]!r}; choose another, or --overwrite"
            )
    file.write_text(json.dumps(settings, indent=2) + "\n")


def job_of(run: Run, model: str, dtype: str, options: list[str], folder: Path) -> Job:
    if run.mode == "transformers":
        module = "benchmarks.geo3k.reference"
        return Job(run.name, module, [model, dtype], import_path(), folder, ".json")
    flags = ["--enforce-eager"] if run.mode == "eager" else []
    engine = ["--model", model, "--dtype", dtype, "--seed", "0", *options, *flags]
    module = "benchmarks.geo3k.engine"
    return engine_job(run.name, run.tree, engine, folder, [], module, ".json")


def execute(
    runs: list[Run],
    asked: list[Asked],
    make_job: Callable[[Run], Job],
    serve: dict[str, Any],
    max_tokens: int,
    folder: Path,
    console: Console,
) -> list[Outcome]:
    """One run after the other; what an earlier call has answered is not asked again.

    Raises:
        UserError: a process failed, and its log is named; or an endpoint failed.
    """
    spec = folder / "questions.json"
    spec.write_text(
        json.dumps({"max_tokens": max_tokens, "questions": [asdict(one) for one in asked]})
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[stage]}"),
    )
    outcomes = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for run in runs:
            result, answers = folder / f"{run.name}.json", folder / f"{run.name}.jsonl"
            task = progress.add_task(run.name, total=len(asked), stage="")

            def show(stage: str, task: Any = task, answers: Path = answers) -> None:
                progress.update(task, stage=stage, completed=len(read(answers)))

            if len(read(answers)) < len(asked) or not result.exists():
                if not console.is_terminal:
                    console.print(f"{run.name}: running", highlight=False)
                if run.mode == SERVED:
                    with ThreadPoolExecutor(1) as pool:
                        asking = serve_run(
                            asked=asked, max_tokens=max_tokens, result=result, **serve
                        )
                        future = pool.submit(asyncio.run, asking)
                        while not future.done():
                            show("answering")
                            time.sleep(0.5)
                        future.result()
                else:
                    job = make_job(run)
                    with stopping([job]):
                        job.start(spec)
                        while (stage := job.stage()) != "done":
                            show(stage)
                            time.sleep(0.5)
            show("done")
            outcomes.append(Outcome(run, json.loads(result.read_text()), read(answers)))
    return outcomes
