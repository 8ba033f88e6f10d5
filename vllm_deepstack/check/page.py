"""The check's result as one page that needs no other file: tables, and plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .report import (
    Report,
    about_shares,
    leaked,
    noise,
    number,
    requests,
    rows_by_mode,
    sentences,
    streams,
    summary,
)

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td:last-child { text-align: left }
.agrees { color: #18794e } .diverges, .leaks, .failed { color: #c62a2f; font-weight: bold }
.unknown { color: #ad5700; font-weight: bold }
svg { max-width: 100%; height: auto }
"""
COLORS = {"text": "#8b8d98", "image": "#3e63dd", "audio": "#3e63dd"}
CHANGED = "#c62a2f"
FLOOR = 1e-7
"""What 0 is drawn as, on a logarithmic axis."""


def page(one: Report) -> str:
    about = f"{one['model']}, {one['dtype']}, vLLM {one['vllm']}"
    body = [f"<h1>{escape(about)}</h1>"]
    body.append(
        f'<p class="{one["verdict"]}">{escape(summary(one))}</p><p>{escape(noise(one).strip())}</p>'
    )
    body.append(table(one))
    body += [f"<p>{escape(text)}</p>" for text in about_shares(one)]
    for arm in one["arms"]:
        if arm["reason"]:
            body.append(f"<h3>{escape(arm['mode'])}</h3><pre>{escape(arm['reason'])}</pre>")
    if any(arm["samples"] for arm in one["arms"]):
        body.append("<h2>Does it compute the same?</h2>")
        body.append("<p>Largest |Δlogit| to eager at each token; a line is a sample.</p>")
        body.append(svg(tokens(one)))
    if any(requests(arm) for arm in one["arms"]):
        body.append("<h2>Does anything leak?</h2>")
        body.append(
            "<p>Requests, from the step in which they joined to their last. "
            "Red: their logits are not those that they get alone.</p>"
        )
    for arm in one["arms"]:
        if requests(arm):
            body.append(f"<h3>{escape(arm['mode'])}: {leaked(arm)} of {len(requests(arm))}</h3>")
            body.append(listed(sentences(arm)))
            body += [svg(timeline(stream)) for stream in streams(arm)]
    if one["unanswered"]:
        body += ["<h2>Not asked</h2>", listed(one["unanswered"])]
    head = f'<meta charset="utf-8"><title>{escape(about)}</title><style>{STYLE}</style>'
    return (
        f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>{''.join(body)}</body></html>\n"
    )


def table(one: Report) -> str:
    heads, rows = rows_by_mode(one)
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    for cells in rows:
        last = f'<td class="{cells[-1].replace(" ", "-")}">{escape(cells[-1])}</td>'
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells[:-1]) + last)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def listed(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def tokens(one: Report) -> Figure:
    arms = [arm for arm in one["arms"] if arm["samples"]]
    figure = Figure((9, 2.4 * len(arms)), layout="constrained")
    for axes, arm in zip(figure.subplots(len(arms), squeeze=False, sharex=True)[:, 0], arms):
        for about, sample in zip(one["samples"], arm["samples"]):
            steps = [max(step, FLOOR) for step in sample["by_step"]]
            color = COLORS["image" if about["images"] else "text"]
            axes.plot(
                range(1, len(steps) + 1),
                steps,
                color=color if sample["agrees"] else CHANGED,
                marker=".",
                linestyle="-" if about["images"] else "--",
            )
        axes.axhline(one["tolerance"], color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"{arm['mode']} (dashed: text; dotted: tolerance)", fontsize=10, loc="left")
        axes.set_ylabel("|Δlogit|")
    axes.set_xlabel("token")
    return figure


def timeline(stream: dict[str, Any]) -> Figure:
    """Who was in flight with whom, who changed, and after or beside whom."""
    rows = stream["requests"]
    figure = Figure((9, 0.6 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, one in enumerate(rows, 1):
        color = CHANGED if one["changed"] else COLORS[one["kind"]]
        hatch = "" if one["kind"] == "text" else "////"
        width = one["ended"] - one["joined"] + 1
        axes.barh(
            at, width, 0.8, left=one["joined"], color=color, hatch=hatch, edgecolor="white", lw=0
        )
        if one["changed"]:
            axes.text(
                one["ended"] + 1.3, at, number(one["largest"]), va="center", fontsize=7, color=color
            )
            if one["cause"] is not None:
                begins = (rows[one["cause"]]["joined"], one["cause"] + 1)
                axes.annotate(
                    "",
                    (one["joined"], at),
                    begins,
                    arrowprops={"arrowstyle": "->", "color": CHANGED, "lw": 0.6},
                )
    axes.invert_yaxis()
    axes.set_title(f"{stream['name']} (hatched: with media)", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("request")
    return figure


def svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "check"}):  # the same bytes for the same result
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
