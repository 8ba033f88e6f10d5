"""lint: its options."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import cli
from ..cli import UserError
from .classes import Files, Module
from .output import FORMATS, identity, relative
from .rules import RULES, Finding, findings

LINT = """\
Reads vLLM models' code for state that `embed_input_ids` stages and `forward` reads, and that goes
wrong when the model is compiled, or replayed from CUDA graphs. Imports nothing.

{rules}

A line with `# noqa: DS002 and the reason` is left out; without a reason it is not.

exit code: 0 no findings, 1 findings, 2 it could not read the files, or a base class of a model"""
EXAMPLES = """\
examples:
  vllm-deepstack lint my_model.py
  vllm-deepstack lint --select DS001,stale-staging vllm/model_executor/models
  vllm-deepstack lint --format sarif models/ > lint.sarif"""
NOQA = re.compile(r"#\s*noqa:\s*(DS\d{3}(?:\s*,\s*DS\d{3})*)[\s:,-]*(.*)")


def add(verbs: Any) -> None:
    rules = "\n".join(f"  {rule.code} {rule.name:18} {rule.title}" for rule in RULES.values())
    parser = cli.add_verb(
        verbs,
        "lint",
        "find such bugs in any vLLM model's code",
        LINT.format(rules=rules),
        EXAMPLES,
        failed=2,
        execute=execute,
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="files or folders")
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="TREE",
        help="a folder that contains vllm/, for what a model of your own imports from it "
        "(default: that of the vLLM which this Python imports)",
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="(default: text)")
    parser.add_argument(
        "--select",
        type=selected,
        default=list(RULES),
        metavar="CODES",
        help="rules by code or name, or beginnings of codes, with commas (default: all)",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="leave out the findings that are in the file"
    )
    parser.add_argument(
        "--write-baseline", type=Path, metavar="FILE", help="write the findings to a file"
    )


def selected(text: str) -> list[str]:
    """The rules that an option names.

    Raises:
        ArgumentTypeError: there is no such rule.
    """
    found: list[str] = []
    for part in text.split(","):
        part = part.strip()
        codes = [c for c in RULES if part and (c.startswith(part) or RULES[c].name == part)]
        if not codes:
            raise argparse.ArgumentTypeError(f"no rule {part!r}; there are {', '.join(RULES)}")
        found += codes
    return found


def execute(args: argparse.Namespace) -> int:
    vllm = args.vllm or installed()
    if args.vllm and not (args.vllm / "vllm" / "__init__.py").is_file():
        raise UserError(f"--vllm {args.vllm}: no vLLM there: it has no vllm/__init__.py")
    files = Files(args.paths, vllm.resolve() if vllm else None)
    with cli.uncollected():
        found, classes = examine(files, args.select)
    if args.write_baseline:
        args.write_baseline.write_text(json.dumps([identity(f) for f in found], indent=1) + "\n")
        return 0
    if args.baseline:
        try:
            known = json.loads(args.baseline.read_text())
        except ValueError as error:
            raise UserError(f"--baseline {args.baseline}: is no JSON: {error}") from None
        found = [f for f in found if identity(f) not in known]
    if output := FORMATS[args.format](found, classes):
        print(output)
    missing = {(c, base) for cls in files.models for c in cls.lineage for base in c.missing}
    for cls, base in sorted(missing, key=lambda pair: (str(pair[0].module.file), pair[1])):
        place = f"{relative(cls.module.file)}:{cls.node.lineno}"
        print(f"{place}: {cls.name}: its base {base} cannot be read: --vllm?", file=sys.stderr)
    return 1 if any(not f.inherited for f in found) else 2 if missing else 0


def installed() -> Path | None:
    spec = find_spec("vllm")
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def lint(paths: list[Path], vllm: Path | None, select: list[str]) -> tuple[list[Finding], int]:
    """The findings, by place, each with all classes that have it; and how many were looked at."""
    return examine(Files(paths, vllm.resolve() if vllm else None), select)


def examine(files: Files, select: list[str]) -> tuple[list[Finding], int]:
    found: dict[tuple[str, Path, int, str], Finding] = {}
    asked = {module.file for module in files.asked}
    for cls in files.models:
        for finding in findings(cls):
            key = (finding.code, finding.file, finding.line, finding.attribute)
            if finding.code not in select or excused(files.modules[finding.file], finding):
                continue
            names = {cls.name, *(found[key].also if key in found else ())} - {finding.cls}
            if key not in found or cls.name == finding.cls:  # that class's own reader
                found[key] = finding
            places = finding.file, finding.writer.method.file, finding.reader.method.file
            apart = asked.isdisjoint(places)
            found[key] = replace(found[key], also=tuple(sorted(names)), inherited=apart)
    ordered = sorted(found.values(), key=lambda f: (str(f.file), f.line, f.code))
    return ordered, len(files.models)


def excused(module: Module | None, finding: Finding) -> bool:
    match = NOQA.search(module.text.splitlines()[finding.line - 1]) if module else None
    if match is None or finding.code not in match[1]:
        return False
    if not match[2].strip():
        place = f"{finding.file}:{finding.line}"
        print(f"{place}: `# noqa: {match[1]}` gives no reason, and is ignored", file=sys.stderr)
        return False
    return True
