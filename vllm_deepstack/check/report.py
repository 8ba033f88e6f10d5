"""The check's result: what it is (JSON, docs/schemas/check.json), and as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compare import compare, tolerance
from .processes import EngineError
from .ran import described
from .run import Result

Report = dict[str, Any]
SCHEMA = 3
"""Of a report: docs/schemas/check.json. Another number when a field changes its meaning."""
WRONG = ("leaks", "diverges")
# Kinds of steps, by what they have of a prompt.
WHOLE, CHUNKS, SINGLE = "whole prompts", "chunks", "a token a step"
SHOWN = 5  # leaks of a mode, in the terminal
STYLES = {"agrees": "green", "diverges": "bold red", "leaks": "bold red", "failed": "bold red"}


def report(
    model: str,
    eager: Result,
    arms: Mapping[str, Result | EngineError],
    reference: Result | None = None,
    limit: float | None = None,
    max_kl: float | None = None,
) -> Report:
    """Compares the engines in other modes with the eager one, and with Transformers if there is a
    `reference`. `limit`: the largest |Δlogit| that is agreement (default: by dtype and logits).
    `max_kl`: the largest mean KL to Transformers that is agreement, in nats (default: any)."""
    runs = [*eager.runs, *eager.alone.values()]
    if limit is None:
        least = 0.0 if eager.meta.get("pooling") else 10.0
        limit = tolerance(eager.meta["dtype"], runs, least)
    samples = [
        {"prompt_tokens": len(prompt), "images": images, "image_tokens": tokens}
        for prompt, images, tokens in zip(eager.prompts, eager.images, eager.image_tokens)
    ]
    unknown = [] if reference is None else other_tokens("Transformers", eager, reference)
    if unknown:
        reference = None
    ungated = max_kl is not None and reference is None
    if ungated:
        unknown.append("the KL to Transformers, which --max-kl asks for")
    found = [arm("eager", eager, eager, reference, limit)]
    found += [arm(mode, eager, result, reference, limit) for mode, result in arms.items()]
    for each in found:
        each["rollout"] = rollout(each["to_transformers"])
        over = max_kl is not None and each["rollout"] and each["rollout"]["mean_kl"] > max_kl
        each["over_kl"] = bool(over)
        if over and each["verdict"] in ("agrees", "noise"):
            each["verdict"] = "diverges"
            each["reason"] = f"mean KL to Transformers is above {number(max_kl)}"
    floor = [
        largest(difference)
        for each in found[1:]
        for sample, difference in zip(samples, each["samples"])
        if not sample["images"]
    ]
    shares = eager.meta.get("shares")
    unknown += unanswered(found, shares, eager.meta.get("gpu"), limit)
    unknown += eager.meta.get("notes", [])
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
        "unanswered": unknown,
        "verdict": verdict(found, shares, limit, ungated),
    }


def arm(
    mode: str, eager: Result, result: Result | EngineError, reference: Result | None, limit: float
) -> dict[str, Any]:
    """One engine: its samples to eager's, its requests alone to eager's, and what leaked in it."""
    given: dict[str, Any] = {"mode": mode, "verdict": "", "reason": "", "seconds": None}
    given |= {"samples": [], "to_transformers": [], "alone": None, "leaks": None, "warnings": []}
    given |= {"ran": None, "noise": {}, "rollout": None, "over_kl": False}
    if isinstance(result, EngineError):
        return given | {"verdict": "failed", "reason": printable(str(result))}
    given["ran"] = result.meta.get("ran")
    if "missing" in result.meta:
        return given | {"verdict": "not run", "reason": result.meta["missing"]}
    if others := other_tokens(mode, eager, result):
        return given | {"verdict": "failed", "reason": others[0]}
    given["seconds"], given["reason"] = round(result.seconds, 1), printable(result.error)
    given["warnings"] = result.meta.get("warnings", [])
    given["noise"] = noise_of(result)
    limits = limits_of(given["noise"], limit)
    if result is not eager:
        # Samples run in company, and what is alone is padded to another batch.
        both_limits = limits_of(louder(noise_of(eager), given["noise"]), limit)
        whole = both_limits.get(WHOLE, (limit, limit))
        given["samples"] = [
            agreement(compare(theirs, ours), whole) for theirs, ours in zip(eager.runs, result.runs)
        ]
        both = [
            agreement(compare(eager.alone[name], run), whole)
            for name, run in result.alone.items()
            if name in eager.alone
        ]
        given["alone"] = together(both)
    if reference is not None:
        given["to_transformers"] = [
            agreement(compare(theirs, ours), (limit, limit))
            for theirs, ours in zip(reference.runs, result.runs)
        ]
    if leaks := result.meta.get("leaks"):
        given["leaks"] = leaks_of(leaks, limits, limit)
    differ = sum(not sample["agrees"] for sample in given["samples"])
    differ += given["alone"]["differ"] if given["alone"] else 0
    given["verdict"] = "leaks" if leaked(given) else "diverges" if differ else "agrees"
    if result.error and given["verdict"] == "agrees":
        given["verdict"] = "failed"
    elif given["verdict"] == "agrees" and (loud := swallowed(given, eager, limit)):
        given |= {"verdict": "noise", "reason": loud}
    return given


def swallowed(given: Mapping[str, Any], eager: Result, tolerance: float) -> str:
    """Why the limit that batch noise sets may hide a mistake; nothing if it does not. It may where
    something is above the tolerance, and the limit is a fourth of what the media count, or more."""
    limit = loudest(louder(noise_of(eager), given["noise"]), tolerance)
    moved = [largest(sample) for sample in given["samples"]]
    moved += [given["alone"]["largest"]] if given["alone"] else []
    moved += [request["largest"] for request in requests(given)]
    shares = eager.meta.get("shares") or {}
    counts = [shares[name] for name in ("blank", "levels") if shares.get(name) is not None]
    if max(moved, default=0.0) <= tolerance or limit < min(counts, default=16 * tolerance) / 4:
        return ""
    text = f"text alone moves text by {number(limit / 2)} in other batches"
    if counts:
        text += f", and the media count by {number(min(counts))}"
    return f"{text}; --dtype float32, or VLLM_BATCH_INVARIANT=1, may have less noise"


def loudest(noise: Mapping[str, Any], tolerance: float) -> float:
    """The largest limit of changes."""
    limits = limits_of(noise, tolerance).values()
    return max([tolerance, *(limit for pair in limits for limit in pair)])


def louder(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: {
            name: max(of.get(kind, {}).get(name, 0.0) for of in (one, other))
            for name in ("first", "decode")
        }
        for kind in one | other
    }


def rollout(differences: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What trainers compare a rollout with: the tokens that the engine chose, up to the first that
    differs in each sample, by Transformers' log-probabilities."""
    chosen = [moved for each in differences for moved in each["chosen"]]
    kls = [kl for each in differences for kl in each["kls"]]
    if not chosen:
        return None
    of = {"mean": np.mean(chosen), "largest": max(chosen), "mean_kl": np.mean(kls)}
    return {"tokens": len(chosen), **{name: finite(float(value)) for name, value in of.items()}}


def other_tokens(name: str, eager: Result, other: Result) -> list[str]:
    """How an engine was given other samples than eager."""
    return [
        f"sample {i + 1}: {name} was given other tokens than eager: {len(theirs)} and {len(ours)}"
        for i, (ours, theirs) in enumerate(zip(eager.prompts, other.prompts, strict=True))
        if not np.array_equal(ours, theirs)
    ] + [
        f"sample {i + 1}: {name} gives logits {ours.logits.shape}, and eager {theirs.logits.shape}"
        for i, (ours, theirs) in enumerate(zip(other.runs, eager.runs))
        if ours.logits.shape != theirs.logits.shape
    ]


def finite(value: float) -> float:
    """JSON has no infinity, and what is no number is as far off."""
    return sys.float_info.max if value != value else min(value, sys.float_info.max)


def agreement(difference: Any, limits: tuple[float, float]) -> dict[str, Any]:
    """`limits`: of the first token, and of later ones."""
    found = asdict(difference)
    found["agrees"] = not above(found, limits)
    for name in ("first", "decode", "kl"):
        found[name] = None if found[name] is None else finite(found[name])
    lists = ("by_step", "chosen", "kls")
    return found | {name: [finite(step) for step in found[name]] for name in lists}


def together(differences: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not differences:
        return None
    differ = sum(not each["agrees"] for each in differences)
    return {
        "requests": len(differences),
        "differ": differ,
        "largest": max(map(largest, differences)),
    }


def noise_of(result: Result) -> dict[str, dict[str, float]]:
    """Batch noise: how far the company of text alone moves text on one engine, by kind of step, at
    the first token and later. Other batches have other kernels, experts, and scales."""
    found = {}
    for kind, rows in (result.meta.get("leaks") or {}).get("text", {}).items():
        moved = [row["difference"] for row in rows if row["difference"]]
        found[kind] = {
            name: finite(max((each[name] or 0.0 for each in moved), default=0.0))
            for name in ("first", "decode")
        }
    return found


def limits_of(noise: Mapping[str, Mapping[str, float]], tolerance: float) -> dict[str, Any]:
    """Twice the batch noise, where that is more than the tolerance: the limit of a change, at the
    first token and later."""
    return {
        kind: (max(tolerance, 2 * each["first"]), max(tolerance, 2 * each["decode"]))
        for kind, each in noise.items()
    }


def leaks_of(
    leaks: Mapping[str, Any], limits: Mapping[str, tuple[float, float]], tolerance: float
) -> dict[str, Any]:
    """What changed in an engine's streams."""
    return {
        "streams": [
            {
                "name": name,
                "kind": (kind := leaks["kinds"].get(name, WHOLE)),
                "requests": changes(rows, limits.get(kind, (tolerance, tolerance))),
            }
            for name, rows in leaks["streams"].items()
        ],
        "not_run": [{"name": n, "reason": printable(r)} for n, r in leaks["not_run"].items()],
    }


def changes(rows: list[dict[str, Any]], limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Of a stream's requests, in the order in which they joined: whether each changed, by the
    limits of the first token and of later ones; of text, after or beside which one: the last that
    had media."""
    found = []
    for number, row in enumerate(rows):
        media = [i for i in range(number) if rows[i]["kind"] != "text"]
        cause = media[-1] if media and row["kind"] == "text" else None
        ended = cause is not None and rows[cause]["ended"] < row["joined"]
        moved = row["difference"]
        by_step = [finite(step) for step in moved["by_step"]] if moved else []
        most = finite(largest(moved)) if moved else None
        entry = {"kind": row["kind"], "changed": bool(moved) and above(moved, limits)}
        entry |= {"largest": most, "by_step": by_step}
        entry |= {"joined": row["joined"], "ended": row["ended"], "cause": cause}
        found.append(entry | {"how": "after" if ended else "beside"})
    return found


def largest(difference: Mapping[str, Any]) -> float:
    return max(difference["first"], difference["decode"] or 0.0)


def above(difference: Mapping[str, Any], limits: tuple[float, float]) -> bool:
    return any(
        not (difference[name] or 0.0) <= limit
        for name, limit in zip(("first", "decode"), limits, strict=True)
    )


def streams(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = arm["leaks"]["streams"] if arm["leaks"] else []
    return found


def printable(text: str) -> str:
    """What others wrote, an engine's log in colors, without what XML does not allow."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def requests(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that were compared with themselves alone."""
    return [r for s in streams(arm) for r in s["requests"] if r["largest"] is not None]


def leaked(arm: Mapping[str, Any]) -> int:
    return sum(request["changed"] for request in requests(arm))


def sentences(arm: Mapping[str, Any]) -> list[str]:
    """request 7 (text) changed by 2.9 after request 6 (image), largest first."""
    found = []
    for stream in streams(arm):
        for at, one in enumerate(stream["requests"]):
            if one["changed"]:
                text = f"request {at + 1} ({one['kind']}) changed by {number(one['largest'])}"
                if (cause := one["cause"]) is None:
                    text += " in the company of others"
                else:
                    kind = stream["requests"][cause]["kind"]
                    text += f" {one['how']} request {cause + 1} ({kind})"
                found.append((one["kind"] != "text", -one["largest"], f"{stream['name']}: {text}"))
    return [text for *_, text in sorted(found)]


def blind(shares: Mapping[str, Any] | None, limit: float) -> list[str]:
    """What does not count, so that nothing about it can be seen."""
    if not shares or shares["blank"] is None:
        return []
    if shares["levels"] is None and (levels := shares["configured"]):
        which = f"the configuration has {levels} DeepStack levels"
        return [f"{which}, and nothing in this engine reads them"]
    kind = shares["modality"] or "image"
    named = {f"blank {kind}s": shares["blank"], "missing DeepStack levels": shares["levels"]}
    return [
        f"{name} change logits by {number(moved)} only: the check could not have seen them"
        for name, moved in named.items()
        if moved is not None and moved <= limit
    ]


def verdict(
    arms: list[dict[str, Any]], shares: Mapping[str, Any] | None, limit: float, ungated: bool
) -> str:
    states = [each["verdict"] for each in arms]
    for state in WRONG:
        if state in states:
            return state
    asked = any(state == "agrees" for state in states[1:])
    unsure = {"failed", "noise"} & {*states} or blind(shares, limit) or ungated
    return "agrees" if asked and not unsure else "unknown"


def unanswered(
    arms: list[dict[str, Any]],
    shares: Mapping[str, Any] | None,
    gpu: bool | None,
    limit: float,
) -> list[str]:
    found = [f"mode {a['mode']}: {a['reason']}" for a in arms if a["verdict"] == "not run"]
    found += [f"mode {a['mode']}: failed" for a in arms if a["verdict"] == "failed"]
    found += [
        f"mode {a['mode']}, from noise: {a['reason']}" for a in arms if a["verdict"] == "noise"
    ]
    not_run = [each for a in arms if a["leaks"] for each in a["leaks"]["not_run"]]
    found += dict.fromkeys(f"leaks, {each['name']}: {each['reason']}" for each in not_run)
    for each in arms:
        loud = loudest(each["noise"], limit)
        if each["verdict"] != "noise" and loud > limit:
            text = f"batch noise; text alone moves text by {number(loud / 2)}"
            found.append(f"changes below {number(loud)} in mode {each['mode']}: {text}")
    found += [f"mode {a['mode']}: {text}" for a in arms for text in a["warnings"]]
    if gpu is False:
        replayed = any(a["mode"] == "replay" and a["samples"] for a in arms)
        what = "CUDA's kernels, memory and streams" if replayed else "what replayed CUDA graphs do"
        found.append(f"{what}: needs a GPU")
    if shares and shares["blank"] is None:
        found.append("what images count: the samples have none")
    elif shares and shares["levels"] is None and not shares["configured"]:
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


def by_mode(reports: Mapping[str, Report]) -> Table:
    """A row for each engine, below the name of its vLLM, if it has one."""
    named = any(reports)
    heads, _ = rows_by_mode(next(iter(reports.values())))
    table = columns(*[""] * named, *heads)
    for at in (0, int(named), -1):
        table.columns[at].justify = "left"
    for name, one in reports.items():
        for at, row in enumerate(rows_by_mode(one)[1]):
            names = ["" if at else name] * named
            table.add_row(*names, *row, style=STYLES.get(row[-1], "dim"))
        table.add_section()
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
            console.print(by_mode({"": one}))
        for each in one["arms"]:
            if each["ran"]:
                line(f"  {each['mode']}: {described(each['ran'])}")
            if trained := each["rollout"]:
                line(
                    f"  {each['mode']} to Transformers, of {trained['tokens']} tokens: log-"
                    f"probabilities off by {number(trained['mean'])} in the mean, "
                    f"{number(trained['largest'])} at most; mean KL {number(trained['mean_kl'])}"
                )
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
            if each["reason"] and each["verdict"] not in ("not run", "noise"):
                line(f"  {each['mode']}: {escape(each['reason'])}")
        style = STYLES.get(one["verdict"], "bold yellow")
        line(f"vLLM {one['vllm']}: [{style}]{summary(one)}[/]{noise(one)}")


def about_shares(one: Report) -> list[str]:
    shares = one["shares"]
    if not shares or shares["blank"] is None:
        return []
    kind = shares["modality"] or "image"
    found = [f"without the {kind}s' content, logits change by {number(shares['blank'])}"]
    if shares["levels"] is not None:
        found.append(f"without DeepStack's levels, by {number(shares['levels'])}")
    return found + blind(shares, one["tolerance"])


def summary(one: Report) -> str:
    counts = {
        state: [each["mode"] for each in one["arms"] if each["verdict"] == state]
        for state in (*WRONG, "agrees")
    }
    if one["verdict"] == "agrees":
        ran = [mode for mode in counts["agrees"] if mode != "eager"]
        asked = [each for each in one["arms"] if requests(each)]
        whole = one["gpu"] and not any(each["leaks"]["not_run"] for each in asked)
        leaks = "nothing leaks" if whole else "nothing leaks in what was asked"
        return f"agrees ({', '.join(ran)})" + (f", {leaks}" if asked else "")
    if one["verdict"] == "unknown":
        noisy = [each["mode"] for each in one["arms"] if each["verdict"] == "noise"]
        return f"cannot tell from noise ({', '.join(noisy)})" if noisy else "cannot tell"
    said = [f"{state} ({', '.join(counts[state])})" for state in WRONG if counts[state]]
    return ", ".join(said)


def noise(one: Report) -> str:
    floor = one["noise_floor"]
    text = "" if floor is None else f"; noise floor {number(floor)}"
    return f" (tolerance {one['tolerance']:.3g}{text})"


def show_together(reports: Mapping[str, Report], console: Console) -> None:
    """Prints reports of several vLLMs on the same samples: one table, and what each comes to."""
    one = next(iter(reports.values()))
    console.print(f"{escape(one['model'])}, {one['dtype']}, against vLLM's eager mode:")
    console.print(by_mode(reports))
    for name, each in reports.items():
        style = STYLES.get(each["verdict"], "bold yellow")
        console.print(f"{name} ({each['vllm']}): [{style}]{summary(each)}[/]", highlight=False)


def exit_code(one: Report) -> int:
    """0: it agrees, 1: it diverges or leaks, 2: the check cannot tell."""
    return {"agrees": 0, "unknown": 2}.get(one["verdict"], 1)
