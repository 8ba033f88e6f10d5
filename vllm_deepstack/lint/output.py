"""Findings as text, JSON, SARIF and GitHub's annotations."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .. import PROJECT, __version__
from .rules import RULES, Finding
from .state import Place

SCHEMA = 2
"""Of `--format json`: docs/schemas/lint.json. Another number when a field changes its meaning."""


@cache
def repository(folder: Path) -> Path:
    """What a CI's paths are relative to."""
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel"]
    try:
        told = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        told = ""
    return Path(told or os.environ.get("GITHUB_WORKSPACE") or folder).resolve()


def relative(file: Path, to: Path | None = None) -> str:
    """To the current folder, or another. Absolute, where it is not below."""
    path = os.path.relpath(file, to)
    return str(file) if path.startswith("..") else Path(path).as_posix()


def in_repository(file: Path) -> str:
    return relative(file, repository(Path.cwd()))


def link(code: str) -> str:
    return f"{PROJECT}/blob/main/docs/lint.md#{code.lower()}"


def written_and_read(finding: Finding, path: Callable[[Path], str]) -> str:
    places = finding.writer, finding.reader
    writer, reader = (f"{p.method.name} ({path(p.method.file)}:{p.line})" for p in places)
    also = f"; also in {', '.join(finding.also)}" if finding.also else ""
    return f"written by {writer}, read by {reader}{also}"


def text(findings: list[Finding], classes: int) -> str:
    lines = []
    for finding in sorted(findings, key=lambda f: f.inherited):
        if finding.inherited and "In files that were not asked for:" not in lines:
            lines.append("In files that were not asked for:")
        place = f"{relative(finding.file)}:{finding.line}"
        lines.append(f"{place}: {finding.code} {finding.rule.name}: {finding.message}")
        lines.append(f"    {written_and_read(finding, relative)}")
        lines.append(f"    {link(finding.code)}")
    found = f"{len(findings)} finding{'s' * (len(findings) != 1)}"
    return "\n".join([*lines, f"{found} in {classes} classes that embed and run"])


def as_json(findings: list[Finding], classes: int) -> str:
    def place(at: Place) -> dict[str, Any]:
        return {"method": at.method.name, "file": in_repository(at.method.file), "line": at.line}

    rows = [
        {
            **identity(finding),
            "name": finding.rule.name,
            "line": finding.line,
            "why": finding.rule.why,
            "writer": place(finding.writer),
            "reader": place(finding.reader),
            "also": list(finding.also),
            "inherited": finding.inherited,
            "docs": link(finding.code),
        }
        for finding in findings
    ]
    return json.dumps({"schema": SCHEMA, "classes": classes, "findings": rows}, indent=1)


def identity(finding: Finding) -> dict[str, str]:
    """What a finding is known by in a baseline: not by its line."""
    file = in_repository(finding.file)
    names = {"class": finding.cls, "attribute": finding.attribute}
    return {"file": file, "code": finding.code, **names}


def sarif(findings: list[Finding], classes: int) -> str:
    """https://docs.oasis-open.org/sarif/sarif/v2.1.0"""

    def location(file: Path, line: int) -> dict[str, Any]:
        artifact = {"uri": in_repository(file)}
        return {"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": line}}}

    rules = [
        {
            "id": rule.code,
            "name": rule.name,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.why},
            "helpUri": link(rule.code),
        }
        for rule in RULES.values()
    ]
    results = [
        {
            "ruleId": finding.code,
            "level": "note" if finding.inherited else "error",
            "message": {"text": f"{finding.message}; {written_and_read(finding, in_repository)}"},
            "locations": [location(finding.file, finding.line)],
            "relatedLocations": [
                location(place.method.file, place.line)
                for place in (finding.writer, finding.reader)
            ],
        }
        for finding in findings
    ]
    driver = {"name": "vllm-deepstack", "version": __version__, "rules": rules}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    runs = [{"tool": {"driver": driver}, "results": results}]
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": runs}, indent=1)


def github(findings: list[Finding], classes: int) -> str:
    return "\n".join(
        f"::{'notice' if f.inherited else 'error'} file={in_repository(f.file)},line={f.line},"
        f"title={f.code} {f.rule.name}::{f.message}; {written_and_read(f, in_repository)}"
        for f in findings
    )


FORMATS: dict[str, Callable[[list[Finding], int], str]] = {
    "text": text,
    "json": as_json,
    "sarif": sarif,
    "github": github,
}
