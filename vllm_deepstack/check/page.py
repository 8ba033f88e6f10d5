"""The check's result as one page that needs no other file: what the terminal shows, and plots."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from .report import Report, number, requests, show, streams

CHANGED, TEXT, MEDIA = "#c62a2f", "#8b8d98", "#3e63dd"
FLOOR = 1e-7
"""What 0 is drawn as, on a logarithmic axis."""


def page(one: Report) -> str:
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    show([one], console)
    plots = [svg(tokens(one))] if any(arm["samples"] for arm in one["arms"]) else []
    plots += [svg(timeline(arm, s)) for arm in one["arms"] if requests(arm) for s in streams(arm)]
    text = console.export_html(inline_styles=True)
    return text.replace("</body>", "".join(plots) + "</body>")


def tokens(one: Report) -> Figure:
    """|Δlogit| to eager at each token: a line is a sample, dashed if it is text."""
    arms = [arm for arm in one["arms"] if arm["samples"]]
    figure = Figure((9, 2.4 * len(arms)), layout="constrained")
    for axes, arm in zip(figure.subplots(len(arms), squeeze=False, sharex=True)[:, 0], arms):
        for about, sample in zip(one["samples"], arm["samples"]):
            steps = [max(step, FLOOR) for step in sample["by_step"]]
            color = (MEDIA if about["images"] else TEXT) if sample["agrees"] else CHANGED
            style = "-" if about["images"] else "--"
            axes.plot(range(1, len(steps) + 1), steps, color=color, marker=".", linestyle=style)
        axes.axhline(one["tolerance"], color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"{arm['mode']} (dashed: text; dotted: tolerance)", fontsize=10, loc="left")
        axes.set_ylabel("|Δlogit|")
    axes.set_xlabel("token")
    return figure


def timeline(arm: dict[str, Any], stream: dict[str, Any]) -> Figure:
    """Who was in flight with whom; red: who changed, and after or beside whom."""
    rows = stream["requests"]
    figure = Figure((9, 0.6 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, one in enumerate(rows, 1):
        text, begun, ended = one["kind"] == "text", one["joined"], one["ended"]
        color = CHANGED if one["changed"] else TEXT if text else MEDIA
        look: dict[str, Any] = {
            "color": color,
            "hatch": "" if text else "////",
            "ec": "white",
            "lw": 0,
        }
        axes.barh(at, ended - begun + 1, 0.8, left=begun, **look)
        if one["changed"]:
            axes.text(ended + 1.3, at, number(one["largest"]), va="center", fontsize=7, color=color)
        if one["changed"] and one["cause"] is not None:
            begins = (rows[one["cause"]]["joined"], one["cause"] + 1)
            arrow = {"arrowstyle": "->", "color": CHANGED, "lw": 0.6}
            axes.annotate("", (begun, at), begins, arrowprops=arrow)
    axes.invert_yaxis()
    axes.set_title(f"{arm['mode']}: {stream['name']} (hatched: media)", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("request")
    return figure


def svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "check"}):  # the same bytes for the same result
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
