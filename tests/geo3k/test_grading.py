"""The grader: what counts as the same answer."""

import pytest

from benchmarks.geo3k.grading import boxed, correct

EQUAL = [
    ("80", "80"),
    ("80.0", "80"),
    ("1,000", "1000"),
    ("0.5", r"\frac{1}{2}"),
    ("1/2", r"\frac { 1 } { 2 }"),
    (r"\sqrt{12}", r"2 \sqrt { 3 }"),
    (r"2\sqrt{3}", r"2 \sqrt { 3 }"),
    ("80°", "80"),
    (r"80^\circ", "80"),
    (r"80^{\circ}", "80"),
    ("80 degrees", "80"),
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    ("x=80", "80"),
    (r"\dfrac{\sqrt{2}}{2}", r"\frac { \sqrt { 2 } } { 2 }"),
]
UNEQUAL = [
    ("81", "80"),
    ("8", "80"),
    ("-80", "80"),
    (r"3\sqrt{2}", r"2 \sqrt { 3 }"),
    ("16.97", r"12 \sqrt { 2 }"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    ("", "80"),
    ("x", "80"),
    ("eighty", "80"),
    ("None", "80"),
    ("(((", "80"),
    (r"\frac", "80"),
    ("9^9^9^9", "80"),
    ("80, 81", "80"),
]


@pytest.mark.parametrize(("given", "answer"), EQUAL)
def test_equal(given, answer):
    assert correct(f"So x is \\boxed{{{given}}}.", answer)


@pytest.mark.parametrize(("given", "answer"), UNEQUAL)
def test_unequal(given, answer):
    assert not correct(f"So x is \\boxed{{{given}}}.", answer)


@pytest.mark.parametrize("response", ["", "80", "x = 80", "\\boxed{80", "boxed 80", "\\boxed"])
def test_an_answer_without_a_box_is_wrong(response):
    assert boxed(response) is None
    assert not correct(response, "80")


def test_the_last_box_counts():
    assert boxed(r"\boxed{\frac{1}{2}}, no: \boxed{80}") == "80"
    assert boxed(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
