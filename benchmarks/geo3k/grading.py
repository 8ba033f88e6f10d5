"""Grades responses as Geo3K's are graded: the boxed answer, by mathruler."""

from __future__ import annotations

from mathruler.grader import extract_boxed_content, grade_answer


def boxed(response: str) -> str | None:
    """The content of the response's last box; None if it has none that is closed."""
    content = extract_boxed_content(response)
    return None if content == "None" else content


def correct(response: str, answer: str) -> bool:
    """Whether the boxed content is equal to the answer: as LaTeX, as a number or as a formula.

    Units that mathruler knows do not count, nor does a degree sign.
    """
    content = boxed(response)
    return content is not None and grade_answer(plain(content), plain(answer))


def plain(content: str) -> str:
    return content.replace("°", "^\\circ")
