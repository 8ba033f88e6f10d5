"""Asks a server that runs for leaks: texts alone, and after and beside images."""

from __future__ import annotations

import argparse
import base64
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import cli
from ..cli import UserError
from .probes import PROSE
from .report import SCHEMA, SHOWN, Report, columns, count, finite, number
from .samples import QUESTIONS, drawing
from .server import Answer, Question, RefusedError, Server, apart

TOLERANCE = 0.1
"""Largest |Δ log-probability| that is agreement, in float16 and bfloat16. Of the likeliest tokens,
it shows a third to half of what the logits differ by."""
NOISY = 5  # times the tolerance
AT_ONCE = {"after": 1, "beside": 4}  # requests
Right = Mapping[Question, Answer]
STAGES = {"after": "after images", "beside": "beside images", "reference": "to the reference"}
STYLES = {"nothing seen": "green", "unknown": "bold yellow"}
NEVER = [
    "not asked: an image token alone in its step, after which vLLM's default graphs leak: chats "
    "end in text",
    "other requests to the server may disturb this, and may hide a leak",
]


def text(index: int, words: int) -> Question:
    prose, start = PROSE.split(), 7 * index
    content = " ".join(prose[(start + i) % len(prose)] for i in range(words))
    return Question(f"text {index + 1} ({words} words)", content, 2 + 3 * index % 7)


def image(index: int) -> Question:
    png, size = BytesIO(), (64 + 32 * (index % 3), 64 + 32 * (index // 3 % 3))
    drawing(index).resize(size).save(png, "png")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    # It comes first: what it leaves is in its rows, which short texts have, too.
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    parts += [{"type": "text", "text": QUESTIONS[index % 3]}]
    return Question(f"image {index + 1}", parts, 1 + index % 4)


TEXTS = [text(i, words) for i, words in enumerate((3, 40, 9, 24, 6, 32, 14, 48, 4, 18, 28, 11))]
IMAGES = [image(i) for i in range(8)]
# Three texts after each; all of them twice.
ONE_BY_ONE = [each for i, one in enumerate(IMAGES) for each in (one, *TEXTS[3 * i % 12 :][:3])]
# So long that texts come and go beside them.
LONG = [replace(one, max_tokens=16 + 3 * i) for i, one in enumerate(IMAGES)]
TOGETHER = [each for i, one in enumerate(LONG) for each in (one, *TEXTS[i % 4 :: 4])]


def check(
    server: Server, reference: Server | None, tolerance: float, say: Callable[[str], None]
) -> Report:
    """
    Raises:
        UserError: a server gives no answer, or refuses texts, before anything was found.
    """
    began, rows, reasons = time.monotonic(), list[dict[str, Any]](), list[str]()

    def judge(stage: str, asked: list[Question], got: list[Answer], right: Right) -> None:
        before = None  # an image: it has no right answer
        for question, answer in zip(asked, got):
            if question not in right:
                before = question.name
                continue
            moved = apart(answer, right[question])
            limit = max(tolerance, 2 * noise["beside" if stage == "beside" else "after"])
            row = {"stage": stage, "request": question.name, "image": before}
            rows.append(row | {"largest": finite(moved), "changed": moved > limit})

    say("texts alone")
    alone = dict(zip(TEXTS, server.ask_all(TEXTS)))
    noise = {  # in company, arithmetic differs
        stage: finite(max(map(apart, alone.values(), server.ask_all(TEXTS, at_once))))
        for stage, at_once in AT_ONCE.items()
    }
    if reference:
        say("texts, the reference")
        judge("reference", TEXTS, reference.ask_all(TEXTS), alone)
    answers: dict[str, list[Answer]] = {}
    try:
        for stage, asked in (("after", ONE_BY_ONE), ("beside", TOGETHER)):
            if noise[stage] > NOISY * tolerance:
                how = "one after another" if stage == "after" else "together"
                reasons.append(f"texts alone, {how}, change by {number(noise[stage])}: too noisy")
                continue
            say(f"texts {stage} images")
            answers[stage] = server.ask_all(asked, AT_ONCE[stage])
            judge(stage, asked, answers[stage], alone)
        if reference and "after" in answers:
            say("images, the reference")
            ours = dict(zip(ONE_BY_ONE, answers["after"]))
            judge("reference", IMAGES, reference.ask_all(IMAGES), ours)
    except UserError as error:
        if not isinstance(error, RefusedError) and not any(row["changed"] for row in rows):
            raise
        reasons.append(str(error))
    if not answers:
        reasons.append("nothing was asked about leaks")
    if server.unsalted:
        reasons.append(f"no cache_salt, so cached prefixes may hide a leak: {server.unsalted}")
    changed = {row["stage"] for row in rows if row["changed"]}
    verdict = "leaks" if changed & {"after", "beside"} else "differs" if changed else ""
    return {
        "schema": SCHEMA,
        "url": server.url,
        "model": server.model,
        "reference_url": reference.url if reference else None,
        "tolerance": tolerance,
        "noise": noise,
        "requests": server.requests + (reference.requests if reference else 0),
        "seconds": round(time.monotonic() - began, 1),
        "compared": rows,
        "unanswered": reasons + NEVER,
        "verdict": verdict or ("unknown" if reasons else "nothing seen"),
    }


def show(report: Report, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"{escape(report['model'])} at {escape(report['url'])}, largest |Δ log-probability|:")
    table = columns("", "changed", "by")
    table.columns[0].justify = "left"
    for stage, name in STAGES.items():
        if rows := [row for row in report["compared"] if row["stage"] == stage]:
            off = sum(row["changed"] for row in rows)
            table.add_row(name, *count(off, len(rows), [row["largest"] for row in rows]))
    if table.rows:
        console.print(table)
    changed = [row for row in report["compared"] if row["changed"]]
    for row in sorted(changed, key=lambda row: -row["largest"])[:SHOWN]:
        to = f"{row['stage']} {row['image']}" if row["image"] else "from the reference"
        by = f"by {number(row['largest'])}" if row["largest"] < finite(math.inf) else "altogether"
        line(f"  {row['request']} changed {by} {to}")
    for reason in report["unanswered"]:
        line(f"  {escape(reason)}")
    said = "cannot tell" if report["verdict"] == "unknown" else report["verdict"]
    style = STYLES.get(report["verdict"], "bold red")
    line(
        f"[{style}]{said}[/] (tolerance {report['tolerance']:.3g}, noise "
        f"{number(max(report['noise'].values()))}), "
        f"{report['requests']} requests in {report['seconds']:.0f} s"
    )


def execute(args: argparse.Namespace) -> int:
    file = Path(args.json) if args.json not in (None, "-") else None
    if file and file.is_file():
        file.unlink()  # an earlier check's
    key = (args.api_key or os.environ.get("OPENAI_API_KEY", "")).strip()
    how = (args.model, key, args.timeout or 60)
    server = Server(args.url, *how)
    reference = Server(args.reference_url, *how) if args.reference_url else None
    console, began = Console(stderr=True), time.monotonic()
    parts = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*parts, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def say(stage: str) -> None:
            progress.update(task, description=stage)
            if not console.is_terminal:
                console.print(f"{stage} ({time.monotonic() - began:.0f} s)", highlight=False)

        tolerance = TOLERANCE if args.tolerance is None else args.tolerance
        report = check(server, reference, tolerance, say)
    if file:
        cli.write_json(report, file)
    if args.json == "-":
        print(cli.dumps(report), end="")
    else:
        show(report, Console(width=cli.width()))
    return {"nothing seen": 0, "unknown": 2}.get(report["verdict"], 1)
