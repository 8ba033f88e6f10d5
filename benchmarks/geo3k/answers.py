"""One run's answers: JSON lines, appended as they come, so that a run can go on."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .grading import boxed, correct


@dataclass(frozen=True)
class Asked:
    """A question as workers get it: images as files."""

    number: int
    content: list[dict[str, Any]]
    """Parts of a user's message: `{"type": "text", "text": …}`, `{"type": "image", "path": …}`."""
    answer: str


@dataclass(frozen=True)
class Answered:
    number: int
    answer: str
    boxed: str | None
    correct: bool
    response: str
    finish_reason: str
    tokens: int
    """Of the response."""
    seconds: float
    """What the run took longer for this answer: summed, they are the run's wall time."""


def read(file: Path) -> list[Answered]:
    """All complete lines, in the questions' order."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]  # splitlines() would also split responses
    found = [Answered(**json.loads(line)) for line in lines]
    return sorted(found, key=lambda answered: answered.number)


class Answers:
    """Appends to a run's file. An incomplete last line, of a run that was killed, is dropped."""

    def __init__(self, file: Path):
        text = file.read_text() if file.exists() else ""
        file.write_text(text[: text.rfind("\n") + 1])
        self.file = file
        self.done = {answered.number for answered in read(file)}
        self.last = time.monotonic()

    def left(self, asked: list[Asked]) -> list[Asked]:
        return [one for one in asked if one.number not in self.done]

    def add(self, outcomes: list[tuple[Asked, str, str, int]]) -> None:
        """Outcomes of one moment: question, response, finish reason, number of tokens."""
        now = time.monotonic()
        share = (now - self.last) / len(outcomes)
        self.last = now
        lines = []
        for asked, response, finish_reason, tokens in outcomes:
            answered = Answered(
                asked.number,
                asked.answer,
                boxed(response),
                correct(response, asked.answer),
                response,
                finish_reason,
                tokens,
                share,
            )
            lines.append(json.dumps(asdict(answered), ensure_ascii=False) + "\n")
        with self.file.open("a") as out:
            out.writelines(lines)
