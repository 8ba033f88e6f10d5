"""Findings as text, JSON, SARIF and GitHub's annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from . import DOCS
from .rules import RULES, Finding
from .state import Place

SCHEMA = 1
"""Of `--format json`: docs/schemas/lint.json. Another number when a field changes its meaning."""


def relative(file: Path) -> str:
    """As a person would write it, where it is below the current folder."""
    path = os.path.relpath(file)
    return str(file) if path.startswith("..") else path


def link(code: str) -> str:
    return f"{DOCS}#{code.lower()}"


def written_and_read(finding: Finding) -> str:
    def at(place: Place) -> str:
        return f"{place.method.name} ({relative(place.method.file)}:{place.line})"

    text = f"written by {at(finding.writer)}, read by {at(finding.reader)}"
    return text + (f"; also in {', '.join(finding.also)}" if finding.also else "")


def text(findings: list[Finding], classes: int) -> str:
    lines = []
    for finding in findings:
        place = f"{relative(finding.file)}:{finding.line}"
        lines.append(f"{place}: {finding.code} {finding.message}")
        lines.append(f"    {written_and_read(finding)}")
        lines.append(f"    {link(finding.code)}")
    found = f"{len(findings)} finding{'s' * (len(findings) != 1)}"
    return "\n".join([*lines, f"{found} in {classes} classes that embed and run"])


def as_json(findings: list[Finding], classes: int) -> str:
    def place(at: Place) -> dict[str, Any]:
        return {"method": at.method.name, "file": relative(at.method.file), "line": at.line}

    rows = [
        {
            "code": finding.code,
            "file": relative(finding.file),
            "line": finding.line,
            "class": finding.cls,
            "attribute": finding.attribute,
            "why": RULES[finding.code].why,
            "writer": place(finding.writer),
            "reader": place(finding.reader),
            "also": list(finding.also),
            "docs": link(finding.code),
        }
        for finding in findings
    ]
    return json.dumps({"schema": SCHEMA, "classes": classes, "findings": rows}, indent=1)


def sarif(findings: list[Finding], classes: int) -> str:
    """https://docs.oasis-open.org/sarif/sarif/v2.1.0"""

    def location(file: Path, line: int) -> dict[str, Any]:
        artifact = {"uri": Path(relative(file)).as_posix()}
        region = {"startLine": line}
        return {"physicalLocation": {"artifactLocation": artifact, "region": region}}

    rules = [
        {
            "id": rule.code,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.why},
            "helpUri": link(rule.code),
        }
        for rule in RULES.values()
    ]
    results = [
        {
            "ruleId": finding.code,
            "level": "error",
            "message": {"text": f"{finding.message}; {written_and_read(finding)}"},
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
        f"::error file={relative(f.file)},line={f.line},title={f.code}::"
        f"{f.message}; {written_and_read(f)}"
        for f in findings
    )


FORMATS: dict[str, Callable[[list[Finding], int], str]] = {
    "text": text,
    "json": as_json,
    "sarif": sarif,
    "github": github,
}
