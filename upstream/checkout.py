"""A repository of vLLM's files, in which patches are made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_deepstack.cli import UserError


@dataclass(frozen=True)
class Commit:
    subject: str
    body: str
    files: dict[str, bytes]


class Checkout:
    """A repository with files of the sources as its first commit, by whoever is at work.

    Raises:
        UserError: git does not know who that is.
    """

    def __init__(self, root: Path, sources: Path, paths: Iterable[str]):
        self.root = root
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sources / path, root / path)
        self.git("init", "--quiet", "--initial-branch=main")
        for key in ("user.name", "user.email"):
            if not self.git("config", key, check=False):
                raise UserError(
                    f"git has no {key}, and a patch names its author: git config --global {key} …"
                )
        self.git("add", "--all")
        self.git("commit", "--quiet", "--no-gpg-sign", "--message", "As released")

    def branch(self, name: str, start: str) -> None:
        self.git("switch", "--quiet", "--create", name, start)

    def git(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, input=stdin)
        if check and done.returncode:
            raise UserError(f"git {arguments[0]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def commit(self, commit: Commit) -> None:
        for path, data in commit.files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(data)
        # What a replaced method has used alone, upstream's linters want gone.
        code = [path for path in commit.files if path.startswith("vllm/")]
        ruff = ["ruff", "check", "--isolated", "--select", "F401", "--fix", "--quiet", *code]
        if code:
            subprocess.run([sys.executable, "-m", *ruff], cwd=self.root, check=True)
        self.git("add", *commit.files)
        message = f"{commit.subject}\n\n{commit.body}"
        self.git("commit", "--quiet", "--no-gpg-sign", "--file", "-", stdin=message)

    def patches(self, folder: Path, since: str) -> None:
        """Writes the commits after `since` as patches, for `git am`."""
        self.git("format-patch", "--quiet", "--output-directory", str(folder), since)
