"""An installation's RECORD, which lists its files with their hashes: `pip uninstall` goes by it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence

from .. import STATE


def lines(data: bytes) -> list[str]:
    """With their ends, as they are."""
    return list(io.StringIO(data.decode(errors="surrogateescape"), newline="\n"))


def paths(record: bytes) -> set[str]:
    """The files that a RECORD lists."""
    return {row[0] for row in csv.reader(lines(record)) if row}


def patched(record: bytes, files: Mapping[str, bytes], kept: Sequence[str]) -> bytes:
    """A RECORD once `files` are in place: their rows, and those of what the overlay keeps to put
    back (`kept`: the paths of the originals)."""
    old, rows, known = lines(record), [], set()
    for line in old:
        path = next(iter(next(csv.reader([line]), [])), "")
        known.add(path)
        end = line[len(line.rstrip("\r\n")) :]
        rows.append(row(path, files[path]) + end if path in files else line)
    end = "\r\n" if old[0].endswith("\r\n") else "\n"
    rows += [row(path, data) + end for path, data in files.items() if path not in known]
    rows += [f"{STATE}/{name},,{end}" for name in (".gitignore", "manifest.json")]
    rows += [f"{STATE}/originals/{path},,{end}" for path in kept]
    return "".join(rows).encode(errors="surrogateescape")


def row(path: str, data: bytes) -> str:
    """A RECORD's line for a file, as the wheel format has it."""
    hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={hashed},{len(data)}"
