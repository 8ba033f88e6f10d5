"""The check's result as JUnit XML, for a CI: a suite for each mode."""

from __future__ import annotations

from typing import Any

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from .report import Report, blind, largest, leaked, number, sentences, streams


def junit(one: Report) -> str:
    xml = JUnitXml(f"vllm-deepstack check {one['model']}")
    for arm in one["arms"]:
        suite = TestSuite(arm["mode"])
        for case in cases(arm, one):
            suite.add_testcase(case)
        suite.time = arm["seconds"] or 0
        xml.add_testsuite(suite)
    if one["shares"] and one["shares"]["blank"] is not None:
        suite = TestSuite("media")
        wrong = "; ".join(blind(one["shares"], one["tolerance"]))
        suite.add_testcase(test("media count", "media", Failure(wrong) if wrong else None))
        xml.add_testsuite(suite)
    text: bytes = xml.tostring()
    return text.decode()


def cases(arm: dict[str, Any], one: Report) -> list[TestCase]:
    mode, limit = arm["mode"], number(one["tolerance"])
    if arm["verdict"] == "failed":
        return [test("engine", mode, Error(arm["reason"]))]
    if arm["verdict"] == "not run":
        return [test("engine", mode, Skipped(arm["reason"]))]
    found = []
    for at, sample in enumerate(arm["samples"]):
        moved = f"{number(largest(sample))} off eager (tolerance {limit})"
        found.append(test(f"sample {at + 1}", mode, None if sample["agrees"] else Failure(moved)))
    if alone := arm["alone"]:
        moved = (
            f"{alone['differ']} of {alone['requests']} are off eager, by {number(alone['largest'])}"
        )
        found.append(test("requests alone", mode, Failure(moved) if alone["differ"] else None))
    for stream in streams(arm):
        only = arm | {"leaks": {"streams": [stream]}}
        said = "\n".join(sentences(only))
        found.append(test(stream["name"], mode, Failure(said) if leaked(only) else None))
    if arm["over_kl"]:
        found.append(test("mean KL to Transformers", mode, Failure(arm["reason"])))
    if arm["verdict"] == "noise":
        found.append(test("noise", mode, Error(arm["reason"])))
    for skipped in (arm["leaks"] or {"not_run": []})["not_run"]:
        found.append(test(skipped["name"], mode, Skipped(skipped["reason"])))
    return found


def test(name: str, mode: str, result: Any) -> TestCase:
    case = TestCase(name, classname=f"check.{mode}")
    case.result = [result] if result else []
    return case
