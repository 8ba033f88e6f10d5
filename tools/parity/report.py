"""The check's result: what it is (JSON, docs/schemas/check.json), and as tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import cli
from ..cli import UserError
from ..engines import EngineError
from .compare import compare, tolerance
from .run import Result

Report = dict[str, Any]
SCHEMA = 2
"""Of a report: docs/schemas/check.json. Another number when a field changes its meaning."""
WRONG = ("leaks", "diverges")
SHOWN = 5  # leaks of a mode, in the terminal
STYLES = {"agrees": "green", "diverges": "bold red", "leaks": "bold red", "failed": "bold red"}


def report(
    model: str,
    eager: Result,
    arms: Mapping[str, Result | EngineError],
    reference: Result | None = None,
    limit: float | None = None,
) -> Report:
    """Compares the engines in other modes with the eager one, and with Transformers if there is a
    `reference`. `limit`: the largest |Δlogit| that is agreement (default: by dtype and logits).

    Raises:
        UserError: the engines were not given the same tokens.
    """
    runs = [*eager.runs, *eager.alone.values()]
    limit = tolerance(eager.meta["dtype"], runs) if limit is None else limit
    samples = [
        {"prompt_tokens": len(prompt), "images": images, "image_tokens": tokens}
        for prompt, images, tokens in zip(eager.prompts, eager.images, eager.image_tokens)
    ]
    found = [arm("eager", eager, eager, reference, limit)]
    found += [arm(mode, eager, result, reference, limit) for mode, result in arms.items()]
    floor = [
        largest(difference)
        for each in found[1:]
        for sample, difference in zip(samples, each["samples"])
        if not sample["images"]
    ]
    shares = eager.meta.get("shares")
    return {
        "schema": SCHEMA,
        "model": model,
        "vllm": eager.meta["vllm"],
        "transformers": reference.meta["transformers"] if reference else None,
        "dtype": eager.meta["dtype"],
        "gpu": eager.meta.get("gpu"),
        "tolerance": limit,
        "noise_floor": max(floor, default=None),
        "samples": samples,
        "arms": found,
        "shares": shares,
        "unanswered": unanswered(found, shares, eager.meta.get("gpu")),
        "verdict": verdict(found, shares, limit),
    }


def arm(
    mode: str, eager: Result, result: Result | EngineError, reference: Result | None, limit: float
) -> dict[str, Any]:
    """One engine: its samples to eager's, its requests alone to eager's, and what leaked in it."""
    given: dict[str, Any] = {"mode": mode, "verdict": "", "reason": "", "seconds": None}
    given |= {"samples": [], "to_transformers": [], "alone": None, "leaks": None}
    if isinstance(result, EngineError):
        return given | {"verdict": "failed", "reason": str(result)}
    if "missing" in result.meta:
        return given | {"verdict": "not run", "reason": result.meta["missing"]}
    given["seconds"] = round(result.seconds, 1)
    if result is not eager:
        same_tokens(mode, eager, result)
        given["samples"] = [
            agreement(compare(theirs, ours), limit) for theirs, ours in zip(eager.runs, result.runs)
        ]
        given["alone"] = together(
            [compare(eager.alone[name], run).largest for name, run in result.alone.items()], limit
        )
    if reference is not None:
        same_tokens("Transformers", eager, reference)
        given["to_transformers"] = [
            agreement(compare(theirs, ours), limit)
            for theirs, ours in zip(reference.runs, result.runs)
        ]
    if leaks := result.meta.get("leaks"):
        given["leaks"] = {
            "streams": [
                {"name": name, "requests": changes(rows, limit)}
                for name, rows in leaks["streams"].items()
            ],
            "not_run": [{"name": n, "reason": r} for n, r in leaks["not_run"].items()],
        }
    differ = sum(not sample["agrees"] for sample in given["samples"])
    differ += given["alone"]["differ"] if given["alone"] else 0
    given["verdict"] = "leaks" if leaked(given) else "diverges" if differ else "agrees"
    return given


def same_tokens(name: str, eager: Result, other: Result) -> None:
    for i, (ours, theirs) in enumerate(zip(eager.prompts, other.prompts, strict=True)):
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"sample {i + 1}: {name} was given other tokens than eager: "
                f"{len(theirs)} and {len(ours)} of them"
            )


def agreement(difference: Any, limit: float) -> dict[str, Any]:
    return asdict(difference) | {"agrees": difference.largest <= limit}


def together(moved: list[float], limit: float) -> dict[str, Any] | None:
    if not moved:
        return None
    differ = sum(each > limit for each in moved)
    return {"requests": len(moved), "differ": differ, "largest": max(moved)}


def changes(rows: list[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """Of a stream's requests, in the order in which they joined: whether each changed, and after
    or beside which one: the last that had media, or else the last."""
    found = []
    for number, row in enumerate(rows):
        before = [i for i in range(number) if rows[i]["kind"] != "text"] or [*range(number)]
        cause = before[-1] if before else None
        apart = cause is None or rows[cause]["ended"] < row["joined"]
        entry = {"kind": row["kind"], "changed": largest(row) > limit, "largest": largest(row)}
        entry |= {"by_step": row["by_step"], "joined": row["joined"], "ended": row["ended"]}
        found.append(entry | {"cause": cause, "how": "after" if apart else "beside"})
    return found


def largest(difference: Mapping[str, Any]) -> float:
    return max(difference["first"], difference["decode"] or 0.0)


def requests(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for s in (arm["leaks"] or {"streams": []})["streams"] for r in s["requests"]]


def leaked(arm: Mapping[str, Any]) -> int:
    return sum(request["changed"] for request in requests(arm))


def sentences(arm: Mapping[str, Any]) -> list[str]:
    """request 7 (text) changed by 2.9 after request 6 (image), largest first."""
    found = []
    for stream in (arm["leaks"] or {"streams": []})["streams"]:
        for at, one in enumerate(stream["requests"]):
            if one["changed"]:
                text = f"request {at + 1} ({one['kind']}) changed by {number(one['largest'])}"
                if (cause := one["cause"]) is not None:
                    kind = stream["requests"][cause]["kind"]
                    text += f" {one['how']} request {cause + 1} ({kind})"
                found.append((one["largest"], f"{stream['name']}: {text}"))
    return [text for _, text in sorted(found, key=lambda each: -each[0])]


def blind(shares: Mapping[str, Any] | None, limit: float) -> bool:
    """Whether the media do not count, so that nothing about them can be seen."""
    return bool(shares and shares["blank"] is not None and shares["blank"] <= limit)


def verdict(arms: list[dict[str, Any]], shares: Mapping[str, Any] | None, limit: float) -> str:
    states = [each["verdict"] for each in arms]
    for state in WRONG:
        if state in states:
            return state
    asked = any(state == "agrees" for state in states[1:])
    return "agrees" if asked and "failed" not in states and not blind(shares, limit) else "unknown"


def unanswered(
    arms: list[dict[str, Any]], shares: Mapping[str, Any] | None, gpu: bool | None
) -> list[str]:
    found = [f"mode {a['mode']}: {a['reason']}" for a in arms if a["verdict"] == "not run"]
    found += [f"mode {a['mode']}: failed" for a in arms if a["verdict"] == "failed"]
    # On a CPU, those that need graphs are named once, at the end.
    streams = [each for a in arms if a["leaks"] and gpu for each in a["leaks"]["not_run"]]
    found += dict.fromkeys(f"leaks, {each['name']}: {each['reason']}" for each in streams)
    if gpu is False:
        found.append("what replayed CUDA graphs compute, and what leaks from them: needs a GPU")
    if shares and shares["blank"] is None:
        found.append("what images count: the samples have none")
    elif shares and shares["levels"] is None:
        found.append("what DeepStack levels count: no _get_deepstack_input_embeds in the model")
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.0e}"


def columns(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def by_sample(reports: list[Report]) -> Table:
    """The samples of reports side by side, each mode a group of columns."""
    about = columns("#", "tokens", "image")
    for i, sample in enumerate(reports[0]["samples"]):
        about.add_row(str(i + 1), str(sample["prompt_tokens"]), str(sample["image_tokens"]))
    parts, heads = [about], [""]
    for one in reports:
        for each in one["arms"]:
            if not each["samples"]:
                continue
            part = columns("first", "decode", "KL", "same")
            for side in ("eager", each["mode"]) if one["transformers"] else ():
                part.add_column(f"{side}–HF", justify="right", no_wrap=True)
            for i, c in enumerate(each["samples"]):
                same = f"{c['agreed']}/{c['steps']}"
                row = [number(c["first"]), number(c["decode"]), number(c["kl"]), same]
                for side in (one["arms"][0], each) if one["transformers"] else ():
                    row.append(number(largest(side["to_transformers"][i])))
                part.add_row(*row, style=STYLES["agrees" if c["agrees"] else "diverges"])
            parts.append(part)
            heads.append(f" {one['vllm']}, {each['mode']}")
    grid = Table.grid(padding=(0, 1))
    grid.add_row(*heads)
    grid.add_row(*parts)
    return grid


def by_mode(one: Report) -> Table:
    heads, rows = rows_by_mode(one)
    table = columns(*heads)
    table.columns[0].justify = table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(*row, style=STYLES.get(row[-1], "dim"))
    return table


def rows_by_mode(one: Report) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row for each engine: what it computes, and what leaks in it."""
    rows = []
    for each in one["arms"]:
        samples, alone, asked = each["samples"], each["alone"], requests(each)
        off = sum(not sample["agrees"] for sample in samples)
        row = [each["mode"], *count(off, len(samples), map(largest, samples))]
        row += count(alone["differ"], alone["requests"], [alone["largest"]]) if alone else ["", ""]
        row += count(leaked(each), len(asked), (request["largest"] for request in asked))
        seconds = "" if each["seconds"] is None else f"{each['seconds']:.0f}"
        rows.append([*row, seconds, each["verdict"]])
    heads = ["mode", "samples off", "by", "alone off", "by", "changed", "by", "seconds", ""]
    return heads, rows


def count(off: int, total: int, moved: Iterable[float]) -> list[str]:
    return [f"{off} of {total}", number(max(moved))] if total else ["", ""]


def show(reports: list[Report], console: Console) -> None:
    """Prints reports on the same samples: side by side as long as they fit, then one by one."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"{escape(reports[0]['model'])}, {reports[0]['dtype']}, against vLLM's eager mode:")
    ran = sum(bool(each["samples"]) for one in reports for each in one["arms"])
    if 0 < ran <= 2:
        line("largest |Δlogit| (first token, decoding) and KL (nats), tokens that are the same")
        if reports[0]["transformers"]:
            line(f"HF: Transformers {reports[0]['transformers']}, largest |Δlogit|")
        console.print(by_sample(reports))
    for one in reports:
        if len(one["arms"]) > 2 or any(requests(each) for each in one["arms"]):
            console.print(by_mode(one))
        for each in one["arms"]:
            said = sentences(each)
            for text in said[:SHOWN]:
                line(f"  [bold red]{each['mode']}[/]: {text}")
            if len(said) > SHOWN:
                line(f"  {each['mode']}: and {len(said) - SHOWN} more")
        for text in about_shares(one):
            line(f"  {text}")
        for text in one["unanswered"]:
            line(f"  not asked: {escape(text)}")
        for each in one["arms"]:
            if each["verdict"] == "failed":
                line(f"  {each['mode']}: {escape(each['reason'])}")
        style = STYLES.get(one["verdict"], "bold yellow")
        line(f"vLLM {one['vllm']}: [{style}]{summary(one)}[/]{noise(one)}")


def about_shares(one: Report) -> list[str]:
    shares = one["shares"]
    if not shares or shares["blank"] is None:
        return []
    kind = shares["modality"] or "image"
    if blind(shares, one["tolerance"]):
        moved = number(shares["blank"])
        return [f"blank {kind}s change logits by {moved} only: the check could not have seen them"]
    found = [f"without the {kind}s' content, logits change by {number(shares['blank'])}"]
    if shares["levels"] is not None:
        found.append(f"without DeepStack's levels, by {number(shares['levels'])}")
    return found


def summary(one: Report) -> str:
    counts = {
        state: [each["mode"] for each in one["arms"] if each["verdict"] == state]
        for state in (*WRONG, "agrees")
    }
    if one["verdict"] == "agrees":
        ran = [mode for mode in counts["agrees"] if mode != "eager"]
        leaks = ", nothing leaks" if any(requests(each) for each in one["arms"]) else ""
        return f"agrees ({', '.join(ran)}){leaks}"
    if one["verdict"] == "unknown":
        return "cannot tell"
    said = [f"{state} ({', '.join(counts[state])})" for state in WRONG if counts[state]]
    return ", ".join(said)


def noise(one: Report) -> str:
    floor = one["noise_floor"]
    text = "" if floor is None else f"; noise floor {number(floor)}"
    return f" (tolerance {one['tolerance']:.3g}{text})"


def main() -> int:
    """Shows reports that were written with `--json`; the last one's verdict is the exit code."""
    reports = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    show(reports, Console(width=cli.width()))
    return exit_code(reports[-1])


def exit_code(one: Report) -> int:
    """0: it agrees, 1: it diverges or leaks, 2: the check cannot tell."""
    return {"agrees": 0, "unknown": 2}.get(one["verdict"], 1)


if __name__ == "__main__":
    sys.exit(main())
