"""Samples, reports and errors of the check, as far as they need no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tools import ROOT
from tools.__main__ import main
from tools.cli import UserError
from tools.engines import Job
from tools.parity.compare import Run
from tools.parity.report import report, show
from tools.parity.run import Result, run
from tools.parity.samples import Sample, builtin, load, with_images

SCHEMA = json.loads((ROOT / "docs/schemas/check.json").read_text())


@pytest.fixture
def sample_file(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no image")

    def write(*lines: object) -> Path:
        path = tmp_path / "samples.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


class TestSamples:
    def test_built_in(self, tmp_path):
        samples = builtin(5, tmp_path)
        assert [len(s.images) for s in samples] == [1, 1, 2, 1, 0]
        assert len({Path(path).read_bytes() for s in samples for path in s.images}) == 5

    def test_file(self, sample_file, tmp_path):
        path = sample_file(
            {"prompt": "a"},
            "",
            {"messages": [{"role": "user", "content": "b"}], "images": ["a.png"]},
        )
        samples = load(path, None)
        assert samples[0] == Sample(prompt="a")
        assert samples[1].images == [str(tmp_path / "a.png")]
        assert load(path, 1) == samples[:1]

    @pytest.mark.parametrize(
        "line, words",
        [
            ({"prompt": "a", "images": ["b.png"]}, "samples.jsonl:2: .*b.png does not exist"),
            (
                {"prompt": "a", "images": ["broken.png"]},
                "samples.jsonl:2: .*broken.png is not an image",
            ),
            ("{", "samples.jsonl:2: not JSON"),
            ("[]", "samples.jsonl:2: a sample is"),
            ({"images": []}, "samples.jsonl:2: a sample is"),
            ({"prompt": "a", "messages": []}, "samples.jsonl:2: a sample is"),
            ({"prompt": "a", "imgs": []}, "samples.jsonl:2: unknown field 'imgs'"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                "1 image marks .* 0 images",
            ),
            (
                {"messages": [{"role": "system", "content": "x"}], "images": ["a.png"]},
                "0 image marks .* 1 images",
            ),
        ],
    )
    def test_errors(self, sample_file, line, words):
        with pytest.raises(UserError, match=words):
            load(sample_file({"prompt": "fine"}, line), None)

    def test_no_file_and_no_samples(self, tmp_path, sample_file):
        with pytest.raises(UserError, match="cannot be read"):
            load(tmp_path / "none.jsonl", None)
        with pytest.raises(UserError, match="no samples"):
            load(sample_file(""), None)

    def test_images_go_to_their_marks_or_first(self):
        text, mark = {"type": "text", "text": "x"}, {"type": "image"}
        marked = Sample([{"role": "user", "content": [mark, text, mark]}], images=["a", "b"])
        assert with_images(marked, str.upper)[0]["content"] == ["A", text, "B"]
        unmarked = Sample(
            [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
            images=["a", "b"],
        )
        assert with_images(unmarked, str.upper)[1]["content"] == ["A", "B", text]
        plain = Sample([{"role": "user", "content": "x"}])
        assert with_images(plain, str.upper) == plain.messages


def result(*logits: float, prompt=(1, 2), images=(1, 0), dtype="float32") -> Result:
    """Two samples, one step each, of which the first logit is given."""
    runs = [Run(np.array([1]), np.array([[x, 9]], np.float32)) for x in logits]
    meta = {"vllm": "0.22.1", "dtype": dtype, "transformers": "5"}
    return Result(meta, [np.array(prompt)] * len(runs), list(images), list(images), runs)


class TestReport:
    def test_agreement_and_divergence(self):
        one = report("m", result(0, 0), result(2e-4, 1e-5), None, None)
        assert one["agrees"] and one["tolerance"] == 1e-3
        jsonschema.validate(one, SCHEMA)
        assert one["noise_floor"] == pytest.approx(1e-5)
        two = report("m", result(0, 0), result(2e-3, 1e-5), None, None)
        assert [s["agrees"] for s in two["samples"]] == [False, True] and not two["agrees"]
        assert report("m", result(0, 0), result(2e-3, 1e-5), None, 0.01)["agrees"]

    def test_tolerance_goes_by_dtype(self):
        assert report("m", result(0, 0, dtype="bfloat16"), result(0.2, 0), None, None)["agrees"]
        assert not report("m", result(0, 0, dtype="float16"), result(0.2, 0), None, None)["agrees"]

    def test_other_tokens_are_an_error(self):
        with pytest.raises(UserError, match="compiled was given other tokens"):
            report("m", result(0, 0), result(0, 0, prompt=(1, 3)), None, None)

    def test_reference_is_a_third_column(self):
        one = report("m", result(0, 0), result(0, 0), result(0.5, 0), None)
        assert one["agrees"] and one["samples"][0]["eager_to_transformers"]["first"] == 0.5
        jsonschema.validate(one, SCHEMA)
        output = StringIO()
        show([one], Console(file=output, width=80))
        assert "Transformers 5" in output.getvalue() and "0.50" in output.getvalue()

    def test_reports_side_by_side_fit_a_terminal(self):
        reports = [report("m", result(0, 0), result(x, 1e-5), None, None) for x in (2, 0)]
        reports[1]["vllm"] = "0.22.1+deepstack.1.cpu"
        output = StringIO()
        show(reports, Console(file=output, width=80))
        lines = output.getvalue().splitlines()
        assert max(len(line.rstrip()) for line in lines[:-2]) <= 80
        assert "…" not in output.getvalue()
        assert "diverges on 1 of 2" in lines[-2] and "agrees on 2" in lines[-1]


class TestErrors:
    """Exit code 2, and a message that names the culprit."""

    def fails(self, capsys, *arguments: str) -> str:
        assert main(["check", *arguments]) == 2
        return capsys.readouterr().err.replace("\n", "")

    def test_no_model(self, capsys):
        assert "--model /no/model: the folder does not exist" in self.fails(
            capsys, "--model", "/no/model"
        )

    def test_no_vllm(self, capsys, tmp_path):
        assert f"--vllm {tmp_path}: no vLLM there" in self.fails(
            capsys, "--model", "m", "--vllm", str(tmp_path)
        )

    def test_missing_image(self, capsys, sample_file):
        path = sample_file({"prompt": "a", "images": ["none.png"]})
        assert "none.png" in self.fails(capsys, "--model", "m", "--samples", str(path))

    @pytest.mark.parametrize(
        "option", ["--enforce-eager", "--max-logprobs=5", "--num-samples=0", "--max-tokens=0"]
    )
    def test_options_that_undo_the_check(self, capsys, option):
        with pytest.raises(SystemExit) as end:
            main(["check", "--model", "m", option])
        assert end.value.code == 2 and option.split("=")[0] in capsys.readouterr().err

    def test_failed_worker_shows_its_own_error(self, tmp_path):
        job = Job("eager", "tests.parity.broken_worker", [], {"PYTHONPATH": "."}, tmp_path)
        with pytest.raises(
            UserError, match=r"eager failed with exit code 1:\nValueError: no such thing"
        ) as error:
            run([job], tmp_path / "job.json", Console(file=StringIO()), False)
        assert str(job.log) in str(error.value)

    def test_help_says_the_exit_codes(self):
        done = subprocess.run(
            [sys.executable, "-m", "tools", "check", "--help"], capture_output=True, text=True
        )
        assert "0 they agree, 1 they diverge, 2 the check could not run" in done.stdout
