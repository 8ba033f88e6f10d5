"""What the project's commands have in common: errors, options and results."""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A command cannot go on. The message says what is wrong, with which file or value, and what
    to do."""


def run(command: Callable[[], int], failed: int = 2) -> int:
    """The exit code of a command. A UserError gives `failed`, with its message and no traceback; a
    mistake of ours, with one; Ctrl-C, and a reader that is gone, what a shell gives.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except UserError as error:
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"error: {error}", *notes]), file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing at exit, either
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return failed
    except Exception:  # Python's own exit code 1 would say "affected", or "diverges"
        traceback.print_exc()
        return failed


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: going through syntax trees, of which nothing is garbage, takes
    as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def add_verb(
    verbs: Any,
    name: str,
    about: str,
    description: str,
    examples: str,
    *,
    failed: int,
    execute: Callable[[argparse.Namespace], int],
    engine_options: bool = False,
    **options: Any,
) -> argparse.ArgumentParser:
    """A verb of `vllm-deepstack`, which may take vLLM's own options, too. `failed` is its exit code
    after an error; `execute` gives it otherwise."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about,
        description=description,
        epilog=examples,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(
        parser=parser, failed=failed, execute=execute, engine_options=engine_options
    )
    return parser


def positive(text: str) -> int:
    """An option's value.

    Raises:
        ArgumentTypeError: it is not a whole number of at least 1.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def width(piped: int = 200) -> int | None:
    """For tables on stdout: a terminal's own width, and `piped` columns elsewhere."""
    return None if sys.stdout.isatty() else piped


def dumps(value: dict[str, Any]) -> str:
    """JSON with a line for each entry and for each row of a list, which diffs show."""

    def lines(entry: Any) -> str:
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in entry)
            return f"[\n{rows}\n]"
        return json.dumps(entry, ensure_ascii=False)

    return "{" + ",\n".join(f"{json.dumps(key)}: {lines(e)}" for key, e in value.items()) + "}\n"


def write_json(value: dict[str, Any], path: Path) -> None:
    write_text(dumps(value), path)


def write_text(text: str, path: Path) -> None:
    """Replaces the file at once; makes its folder. Writes to a device or a pipe as it is. The
    temporary file has a name that nobody can foresee and put a link at, and is new."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    with part.open("x") as file:  # O_EXCL: no link is followed; and the mode is umask's
        try:
            file.write(text)
            file.close()
            os.replace(part, path)
        except BaseException:
            part.unlink()
            raise
