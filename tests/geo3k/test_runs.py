"""What happens around the engines: going on, refusing, summing up."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.geo3k.__main__ import main
from benchmarks.geo3k.answers import Answers, Asked, read
from benchmarks.geo3k.client import serve_run
from benchmarks.geo3k.data import Question
from benchmarks.geo3k.report import plot, report, show
from benchmarks.geo3k.runs import Outcome, Run, claim, fingerprint
from tests.geo3k import NANO
from vllm_deepstack.cli import UserError

DATA = ["--dataset", str(NANO / "data")]


def asked(*answers: str) -> list[Asked]:
    return [Asked(i, [{"type": "text", "text": "?"}], answer) for i, answer in enumerate(answers)]


def boxes(*values: str) -> list[str]:
    return [f"\\boxed{{{value}}}" for value in values]


def outcome(folder: Path, name: str, right: list[str], given: list[str]) -> Outcome:
    answers = Answers(folder / f"{name}.jsonl")
    for one, response in zip(asked(*right), given):
        answers.add([(one, response, "stop", 5)])
    meta = {"software": "vLLM", "dtype": "float32", "startup_seconds": 1.0}
    return Outcome(Run(name, name), meta, read(answers.file))


def test_goes_on_after_the_last_complete_line(tmp_path):
    file, questions = tmp_path / "eager.jsonl", asked("1", "2", "3")
    answers = Answers(file)
    answers.add([(questions[0], "\\boxed{1}", "stop", 5), (questions[2], "?", "length", 9)])
    with file.open("a") as out:
        out.write('{"number": 1, "ans')  # killed here
    again = Answers(file)
    assert [one.number for one in again.left(questions)] == [1]
    again.add([(questions[1], "\\boxed{3}", "stop", 4)])
    assert [(a.number, a.boxed, a.correct) for a in read(file)] == [
        (0, "1", True),
        (1, "3", False),
        (2, None, False),
    ]


def test_responses_may_have_any_characters(tmp_path):
    answers = Answers(tmp_path / "eager.jsonl")
    strange = "a\u2028b\x85c\r\nd \\boxed{1}"
    answers.add([(asked("1")[0], strange, "stop", 5)])
    assert [(a.response, a.correct) for a in read(answers.file)] == [(strange, True)]


def test_shares_of_time_add_up(tmp_path, monkeypatch):
    clock = iter([10.0, 16.0, 17.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    answers, questions = Answers(tmp_path / "eager.jsonl"), asked("1", "2", "3")
    answers.add([(one, "", "stop", 1) for one in questions[:2]])
    answers.add([(questions[2], "", "stop", 1)])
    assert [answered.seconds for answered in read(answers.file)] == [3, 3, 1]


def test_answers_to_other_questions_are_not_mixed(tmp_path):
    white, black = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    prints = [fingerprint([Question(0, "<image>", [image], "1")]) for image in (white, black)]
    assert prints[0] != prints[1]
    claim(tmp_path, {"questions_sha256": prints[0]}, overwrite=False)
    claim(tmp_path, {"questions_sha256": prints[0]}, overwrite=False)
    (tmp_path / "eager.jsonl").write_text("")
    with pytest.raises(UserError, match=r"its questions_sha256 is .* choose another, or --overw"):
        claim(tmp_path, {"questions_sha256": prints[1]}, overwrite=False)
    claim(tmp_path, {"questions_sha256": prints[1]}, overwrite=True)
    assert not (tmp_path / "eager.jsonl").exists()


def test_the_report(tmp_path, capsys):
    right = ["1", "2", "3", "4"]
    eager = outcome(tmp_path, "eager", right, boxes("1", "2", "3", "5"))
    compiled = outcome(tmp_path, "compiled", right, [*boxes("1", "7", "3"), "no box"])
    settings = {"model": "m", "dataset": "d", "split": "test", "blank_images": False}
    result = report([eager, compiled], settings)
    assert [run["accuracy"] for run in result["runs"]] == [0.75, 0.5]
    # The Wilson interval of 3 in 4, as published tables have it.
    assert result["runs"][0]["interval_95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert [run["unboxed"] for run in result["runs"]] == [0, 1]
    (difference,) = result["differences"]
    assert difference["same"] == 2
    assert difference["differ"] == [1, 3]
    show(json.loads(json.dumps(result)), Console(width=100))
    shown = capsys.readouterr().out
    assert "0.750  0.301–0.954" in shown
    assert "compiled differs from eager on 2: 1, 3" in shown
    plot(result, tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere", *DATA], "--model ./nowhere: the folder does not exist"),
        (["--model", "m", *DATA, "--runs", "fast"], "--runs fast: a run is eager, compiled or"),
        (["--model", "m", *DATA, "--runs", "eager@/tmp"], "eager@/tmp: no vLLM there"),
        (["--model", "m", *DATA, "--split", "dev"], "--split dev: .* has test"),
        (["--base-url", "http://localhost:9/v1", *DATA], "http://localhost:9/v1.*Connection error"),
    ],
)
def test_what_cannot_run_says_why(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--output-dir", str(tmp_path)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--enforce-eager"], "--runs eager and --runs compiled set this"),
        (["--base-url", "http://x/v1", "--max-model-len", "9"], "endpoints have been given"),
        (
            ["--model", "m", "--concurrency", "0"],
            "--concurrency: 0 is not a whole",
        ),
        ([], "--model is required"),
    ],
)
def test_options_that_contradict(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_failed_endpoint_keeps_what_was_answered(tmp_path):
    result = tmp_path / "served.json"
    answers = Answers(result.with_suffix(".jsonl"))
    answers.add([(asked("1")[0], "\\boxed{1}", "stop", 5)])
    with pytest.raises(UserError, match="Answers until now are kept"):
        asyncio.run(serve_run(["http://localhost:9/v1"], "m", asked("1", "2"), 8, 2, result))
    assert len(read(answers.file)) == 1
    assert not result.exists()
