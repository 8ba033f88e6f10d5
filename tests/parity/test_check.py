"""Samples, reports and errors of the check, as far as they need no engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from junitparser import JUnitXml
from PIL import Image
from rich.console import Console

from vllm_deepstack import ROOT
from vllm_deepstack.__main__ import main
from vllm_deepstack.check import engine
from vllm_deepstack.check.compare import Run
from vllm_deepstack.check.junit import junit
from vllm_deepstack.check.modes import BREAKABLE, DEFAULT
from vllm_deepstack.check.page import page
from vllm_deepstack.check.probes import film, media_in_pieces, media_then_text, picture, tone
from vllm_deepstack.check.processes import EngineError, Job
from vllm_deepstack.check.report import SINGLE, WHOLE, Report, exit_code, report, sentences, show
from vllm_deepstack.check.run import Result, outcomes, run
from vllm_deepstack.check.samples import Sample, builtin, load, with_images
from vllm_deepstack.check.stepping import RefusedError, Served
from vllm_deepstack.cli import UserError

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


def result(*logits: float, prompt=(1, 2), images=(1, 0), dtype="float32", **meta) -> Result:
    """Two samples, one step each, of which the first logit is given."""
    runs = [Run(np.array([1]), np.array([[x, 9]], np.float32)) for x in logits]
    meta = {"vllm": "0.22.1", "dtype": dtype, "transformers": "5"} | meta
    return Result(meta, [np.array(prompt)] * len(runs), list(images), list(images), runs)


def request(kind: str, off: float, joined: int, ended: int) -> dict[str, Any]:
    """Of a stream, as an engine reports it."""
    moved = {"first": off, "decode": None, "kl": 0.0, "agreed": 1, "steps": 1, "by_step": [off]}
    return {"kind": kind, "joined": joined, "ended": ended, "difference": moved}


def leaks(
    *requests: dict[str, Any], noise: float = 0.0, kind: str = WHOLE, **not_run: str
) -> dict[str, Any]:
    """`noise`: of text in the company of text, in the kind of steps that the stream has."""
    text = {WHOLE: [request("text", 0, 0, 1)]} | {kind: [request("text", noise, 0, 1)]}
    streams = {"image, then text": list(requests)} if requests else {}
    kinds = {"image, then text": kind}
    return {"text": text, "streams": streams, "kinds": kinds, "not_run": not_run}


SHARES = {"modality": "image", "blank": 3.9, "levels": 2.2, "configured": 0}
LEAKING = leaks(
    request("text", 0, 0, 3),
    request("image", 0, 1, 2),
    request("text", 2.9, 2, 5),
    request("text", 1e-4, 9, 9),
    request("text", 3.1, 10, 11),
)


def made(arms: dict[str, Any] | None = None, **meta: Any) -> Report:
    """A report, which is as the schema says."""
    arms = {"default": result(0, 0)} if arms is None else arms
    one = report("m", result(0, 0, gpu=True, **meta), arms)
    jsonschema.validate(one, SCHEMA)
    return one


def shown(*reports: Report, width: int = 100) -> str:
    output = StringIO()
    show(list(reports), Console(file=output, width=width))
    return output.getvalue()


class TestReport:
    def test_agreement_and_divergence(self):
        one = made({"default": result(2e-4, 1e-5)})
        assert one["verdict"] == "agrees" and one["tolerance"] == 1e-3
        assert one["noise_floor"] == pytest.approx(1e-5)
        two = made({"default": result(2e-3, 1e-5)})
        assert [s["agrees"] for s in two["arms"][1]["samples"]] == [False, True]
        assert two["verdict"] == "diverges"
        arms = {"default": result(2e-3, 1e-5)}
        assert report("m", result(0, 0), arms, limit=0.01)["verdict"] == "agrees"

    @pytest.mark.parametrize("dtype, verdict", [("bfloat16", "agrees"), ("float16", "diverges")])
    def test_tolerance_goes_by_dtype(self, dtype, verdict):
        arms = {"default": result(0.2, 0, dtype=dtype)}
        assert report("m", result(0, 0, dtype=dtype), arms)["verdict"] == verdict

    def test_tolerance_grows_with_the_logits(self):
        eager, compiled = result(90, 90), result(90.008, 90)
        assert report("m", eager, {"default": compiled})["verdict"] == "agrees"

    def test_other_tokens_are_an_error(self):
        one = made({"default": result(0, 0, prompt=(1, 3))})
        assert one["verdict"] == "unknown"
        assert "sample 1: default was given other tokens than eager: 2 and 2" in shown(one)
        other = report("m", result(0, 0), {"default": result(0, 0)}, result(0, 0, prompt=(1, 3)))
        assert other["verdict"] == "agrees" and not other["transformers"]
        assert "Transformers was given other tokens" in other["unanswered"][0]

    def test_reference_is_a_third_column(self):
        one = report("m", result(0, 0), {"default": result(0, 0)}, result(0.5, 0))
        assert one["verdict"] == "agrees" and one["arms"][0]["to_transformers"][0]["first"] == 0.5
        jsonschema.validate(one, SCHEMA)
        assert "Transformers 5" in shown(one) and "0.50" in shown(one)

    def test_rollout_against_trainer(self):
        """The log-probability of what the engine chose, by Transformers; and its gate."""
        eager, reference = result(5, 5), result(5.5, 5)
        one = report("m", eager, {"default": result(5, 5)}, reference)
        rollout = one["arms"][1]["rollout"]
        moved = abs(np.log1p(np.exp(-4)) - np.log1p(np.exp(-3.5)))  # of token 1: 9 against 5, 5.5
        assert rollout["tokens"] == 2 and rollout["largest"] == pytest.approx(moved)
        assert rollout["mean"] == pytest.approx(moved / 2) and 0 < rollout["mean_kl"] < moved
        assert "default to Transformers, of 2 tokens" in shown(one)
        assert one["verdict"] == "agrees"
        gated = report("m", eager, {"default": result(5, 5)}, reference, max_kl=1e-6)
        assert gated["verdict"] == "diverges"
        jsonschema.validate(gated, SCHEMA)
        assert JUnitXml.fromstring(junit(gated).encode()).failures == 2  # eager's, too
        other = result(5.5, 5, prompt=(1, 3))  # Transformers was given other tokens
        ungated = report("m", eager, {"default": result(5, 5)}, other, max_kl=1e-6)
        assert (ungated["verdict"], exit_code(ungated)) == ("unknown", 2)

    def test_noise_between_the_tolerance_and_a_large_limit(self):
        """A text that moved by 5.5 where text alone moves by 3, and the images count by 8."""
        rows = [request("image", 0, 0, 3), request("text", 5.5, 4, 5)]
        arms = {"default": result(0, 0, leaks=leaks(*rows, noise=3.0))}
        one = made(arms, shares=SHARES | {"blank": 8.0, "levels": 8.0})
        assert one["arms"][1]["verdict"] == "noise"
        still = [request("image", 0, 0, 3), request("text", 0, 4, 5)]
        arms = {"default": result(0, 0, leaks=leaks(*still, noise=3.0))}
        assert made(arms, shares=SHARES)["verdict"] == "agrees"  # nothing is above the tolerance

    def test_reports_side_by_side_fit_a_terminal(self):
        reports = [made({"default": result(x, 1e-5)}) for x in (2, 0)]
        reports[1]["vllm"] = "0.22.1+deepstack.1.cpu"
        lines = shown(*reports, width=80).splitlines()
        assert max(len(line.rstrip()) for line in lines[:-2]) <= 80
        assert "…" not in "".join(lines)
        assert "diverges (default)" in lines[-2] and "agrees (default)" in lines[-1]

    def test_a_leak_is_shown_as_what_it_is(self):
        one = made({"default": result(0, 0), "breakable": result(0, 0, leaks=LEAKING)})
        assert one["verdict"] == "leaks" and exit_code(one) == 1
        assert sentences(one["arms"][2]) == [
            "image, then text: request 5 (text) changed by 3.10 after request 2 (image)",
            "image, then text: request 3 (text) changed by 2.90 beside request 2 (image)",
        ]
        text = shown(one)
        assert "breakable: image, then text: request 5 (text) changed by 3.10" in text
        assert "2 of 5" in text and "leaks (breakable)" in text

    def test_what_a_medium_changes_of_its_own_comes_last(self):
        rows = [request("image", 3.5, 0, 3), request("text", 2.9, 4, 5)]
        one = made({"default": result(0, 0, leaks=leaks(*rows))})
        assert sentences(one["arms"][1]) == [
            "image, then text: request 2 (text) changed by 2.90 after request 1 (image)",
            "image, then text: request 1 (image) changed by 3.50 in the company of others",
        ]

    def test_the_company_of_text_is_the_noise(self):
        """Experts that are chosen, and scales of a quantized step, depend on who else is there."""
        rows = [request("image", 0, 0, 3), request("text", 0.005, 4, 5)]
        one = made({"default": result(0, 0, leaks=leaks(*rows, noise=0.003))}, shares=SHARES)
        assert one["verdict"] == "agrees"
        (note,) = [text for text in one["unanswered"] if text.startswith("changes below")]
        assert (
            note
            == "changes below 6e-03 in mode default: batch noise; text alone moves text by 3e-03"
        )
        rows[1] = request("text", 0.007, 4, 5)
        assert (
            made({"default": result(0, 0, leaks=leaks(*rows, noise=0.003))})["verdict"] == "leaks"
        )

    def test_noise_goes_by_the_kind_of_step(self):
        rows = [request("image", 0, 0, 3), request("text", 0.005, 4, 5)]
        single = leaks(*rows, noise=0.003, kind=SINGLE)
        arms = {"default": result(0, 0, leaks=single)}
        assert made(arms, shares=SHARES)["verdict"] == "agrees"
        assert made(arms)["verdict"] == "unknown"  # what the media count is not known
        single["kinds"] = {"image, then text": WHOLE}
        assert made({"default": result(0, 0, leaks=single)})["verdict"] == "leaks"

    def test_samples_have_noise_too(self):
        """A right MoE, compiled: 0.27 off where the tolerance was 0.25 and text moved by 0.17."""
        noisy = leaks(noise=0.17)
        eager = result(0, 0, dtype="bfloat16", leaks=noisy)
        one = report("m", eager, {"default": result(0.27, 0, dtype="bfloat16", leaks=noisy)})
        assert (one["verdict"], one["tolerance"]) == ("agrees", 0.25)
        two = report("m", eager, {"default": result(0.4, 0, dtype="bfloat16", leaks=noisy)})
        assert two["verdict"] == "diverges"

    @pytest.mark.parametrize("shares", [None, SHARES])
    def test_noise_that_swallows_the_answer(self, shares):
        """Text that moves by 5, and a request that is off by 9: nothing can be said."""
        rows = [request("image", 0, 0, 3), request("text", 9, 4, 5)]
        arms = {"default": result(0, 0, leaks=leaks(*rows, noise=5.0))}
        one = made(arms, shares=shares)
        assert (one["verdict"], one["arms"][1]["verdict"], exit_code(one)) == (
            "unknown",
            "noise",
            2,
        )
        text = shown(one)
        assert "cannot tell from noise (default)" in text and "nothing leaks" not in text
        assert "text alone moves text by 5.00 in other batches" in "".join(one["unanswered"])

    def test_requests_that_are_not_judged(self):
        rows = [request("image", 0, 0, 3), request("text", 0, 4, 5)]
        rows[1]["difference"] = None
        one = made({"default": result(0, 0, leaks=leaks(*rows))})
        assert "0 of 1" in shown(one)

    def test_eager_may_leak_too(self):
        assert made(leaks=LEAKING)["verdict"] == "leaks"

    def test_requests_alone_count(self):
        compiled = result(0, 0)
        compiled.alone = {"probe": Run(np.array([1]), np.array([[2, 9]], np.float32))}
        eager = result(0, 0)
        eager.alone = {"probe": Run(np.array([1]), np.array([[0, 9]], np.float32))}
        one = report("m", eager, {"default": compiled})
        assert one["verdict"] == "diverges"
        assert one["arms"][1]["alone"] == {"requests": 1, "differ": 1, "largest": 2.0}

    def test_media_that_do_not_count(self):
        """A model that was fed nothing agrees with itself: that is no agreement."""
        for missing in ("blank", "levels"):
            one = made(shares=SHARES | {missing: 1e-4})
            assert one["verdict"] == "unknown" and exit_code(one) == 2
            assert "the check could not have seen them" in shown(one)
            assert "cannot tell" in shown(one)
        assert "without DeepStack's levels, by 2.20" in shown(made(shares=SHARES))
        one = made(shares=SHARES | {"levels": None, "configured": 3})
        assert one["verdict"] == "unknown"
        assert "has 3 DeepStack levels, and nothing in this engine reads them" in shown(one)

    def test_what_was_not_asked(self):
        needs = leaks(trickle="needs CUDA graphs")
        absent = result()
        absent.meta = {"missing": "vLLM 0.22.1: no such graphs"}
        levels = SHARES | {"levels": None}
        one = made({"default": result(0, 0, leaks=needs), "breakable": absent}, shares=levels)
        assert one["verdict"] == "agrees"
        assert one["unanswered"] == [
            "mode breakable: vLLM 0.22.1: no such graphs",
            "leaks, trickle: needs CUDA graphs",
            "what DeepStack levels count: no _get_deepstack_input_embeds in the model",
        ]
        assert "agrees (default)" in shown(one)  # and not: breakable
        alone = made({"breakable": absent})
        assert alone["verdict"] == "unknown"
        assert "needs a GPU" in "".join(
            report("m", result(0, 0, gpu=False), {"default": result(0, 0)})["unanswered"]
        )

    def test_nothing_leaks_is_said_only_if_it_was_asked(self):
        rows = leaks(request("image", 0, 0, 3), request("text", 0, 4, 5))
        assert "nothing leaks (tol" in shown(made({"default": result(0, 0, leaks=rows)}))
        part = rows | {"not_run": {"trickle": "needs chunked prefill"}}
        text = shown(made({"default": result(0, 0, leaks=part)}))
        assert "nothing leaks in what was asked" in text
        refused = leaks(trickle="refused: prompt too long")
        cpu = report("m", result(0, 0, gpu=False), {"default": result(0, 0, leaks=refused)})
        assert "leaks, trickle: refused: prompt too long" in cpu["unanswered"]
        assert "leaks" not in shown(cpu).splitlines()[-1]

    def test_what_is_not_finite_is_json(self):
        one = made({"default": result(float("nan"), 0)})
        assert one["verdict"] == "diverges"
        json.loads(json.dumps(one, allow_nan=False))

    def test_an_engine_that_dies_later_has_answered(self):
        dead = result(0, 0)
        dead.error = "default failed with exit code 1:\nAssertionError: rows [2]"
        one = made({"default": dead})
        assert one["verdict"] == "unknown" and one["arms"][1]["samples"]
        assert "AssertionError: rows [2]" in shown(one)
        dead.runs[0] = result(2, 0).runs[0]
        assert made({"default": dead})["verdict"] == "diverges"

    def test_a_mode_that_fails(self):
        dead = EngineError("breakable failed with exit code 1:\nAssertionError: rows [2]")
        one = made({"default": result(0, 0), "breakable": dead})
        assert one["verdict"] == "unknown" and exit_code(one) == 2
        assert "AssertionError: rows [2]" in shown(one)
        both = made({"default": result(2, 0), "breakable": dead})
        assert both["verdict"] == "diverges"


class TestFiles:
    """What a CI and a browser get."""

    @pytest.fixture
    def one(self) -> Report:
        absent = result()
        absent.meta = {"missing": "needs a GPU"}
        arms = {
            "default": result(2, 1e-5, leaks=leaks(trickle="<needs> a GPU")),
            "full": EngineError("full died & \x1b[31mno more\x00"),
            "breakable": result(0, 0, leaks=LEAKING),
            "V2": absent,
        }
        return made(arms, shares=SHARES)

    def test_junit(self, one):
        xml = JUnitXml.fromstring(junit(one).encode())
        assert (xml.tests, xml.failures, xml.errors, xml.skipped) == (9, 2, 1, 2)
        found = {(suite.name, case.name): case for suite in xml for case in suite}
        assert "2.00 off eager" in found["default", "sample 1"].result[0].message
        leak = found["breakable", "image, then text"].result[0].message
        assert "request 5 (text) changed by 3.10 after request 2 (image)" in leak
        assert not found["media", "media count"].result

    def test_page(self, one):
        """It needs no other file, is well-formed, and has the same bytes for the same result."""
        text = page(one)
        assert text == page(one)
        assert "request 5 (text) changed by 3.10 after request 2 (image)" in text
        assert "&lt;needs&gt; a GPU" in text and "<needs>" not in text
        assert "full died &amp; [31mno more" in text
        assert not re.search(r"""(?:src|href)=["'](?!#)""", text)
        assert text.count("<svg") == 2  # tokens of the modes that ran, and a stream
        ElementTree.fromstring(text[text.index("<body>") : -len("</html>\n")])


class TestProbes:
    def test_streams(self):
        stream = media_then_text()
        media = [probe for probe in stream if probe.medium is not None]
        assert len(stream) > 40 and len(media) > 15
        assert len(set(media)) < len(media)  # some come again
        assert stream[0].medium is not None
        pieces = media_in_pieces(70)
        text, medium, after = pieces[:3]
        assert (text.medium, medium.medium, after.medium) == (None, 0, None)
        # The other text comes when the medium is through and its row is free; the first decodes.
        assert 70 + medium.max_tokens < after.joins_after
        assert medium.joins_after + after.joins_after + 4 + after.max_tokens < text.max_tokens + 5
        assert [text.judged, medium.judged, after.judged] == [False, True, True]
        assert {probe for probe in media_in_pieces(1) if probe.judged} == {
            probe for probe in pieces if probe.judged
        }

    def test_media(self):
        assert picture(0, blank=False).size == picture(0, blank=True).size == (64, 64)
        assert len(picture(1, blank=True).getcolors()) == 1
        loud, quiet = (np.abs(tone(0, blank)[0]).max() for blank in (False, True))
        assert loud > 10 * quiet
        frames, about = film(1, blank=False)
        assert frames.shape == (4, 64, 64, 3) and about["total_num_frames"] == 4
        assert len({frame.tobytes() for frame in frames}) == 4


class TestProbing:
    """What is asked of an engine, and what is not, with the reason."""

    @pytest.fixture
    def probe(self, monkeypatch):
        """Asks an engine whose media take so many tokens: (streams with their chunks, reasons)."""

        def run(tokens=30, captured=512, marks=None, cuts=True, refused="", adapters=None):
            graphs = SimpleNamespace(cudagraph_capture_sizes=[1, captured] if captured else [])
            cache = SimpleNamespace(enable_prefix_caching=False, block_size=16)
            config = SimpleNamespace(compilation_config=graphs, cache_config=cache)
            config.model_config = SimpleNamespace(max_model_len=4096)
            asked: list[tuple[bool, int]] = []

            class Alone(engine.Alone):
                def ask(self, probes):
                    for one in probes:
                        if refused and one.medium is not None:
                            raise RefusedError(refused)
                        self.found[one] = Served(None, [0] * tokens, 0, 0)

                def in_stream(self, stream, chunk, cached=False):
                    asked.append((any(p.medium is not None for p in stream), chunk))
                    return []

            prompts = SimpleNamespace(placeholders={"image": "<image>"} if marks is None else marks)
            monkeypatch.setattr(engine, "Prompts", lambda llm: prompts)
            monkeypatch.setattr(engine, "Alone", Alone)
            monkeypatch.setattr(engine, "can_chunk", lambda llm: cuts)
            llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
            probing = engine.Probing(llm, flushes=False, adapters=adapters)
            probing.before_media()
            # Text, whole, in chunks and by the token, and before any medium.
            chunk = min(captured // 5, 16) or 4
            assert asked == [(False, 0), *[(False, chunk), (False, 1)] * cuts]
            probing.after_media()
            grammars = asked.pop(-1 - bool(adapters))
            assert grammars == (False, 0)
            return asked[1 + 2 * cuts :], probing.leaks["not_run"]

        return run

    def test_all_of_it(self, probe):
        assert probe() == ([(True, 0), (True, 1)], {})
        each = [(True, 0), (True, 1)]
        assert probe(marks={"image": "<i>", "video": "<v>", "audio": "<a>"}) == (each * 3, {})
        assert probe(adapters={"mine": "/folder"}) == ([*each, (True, 0)], {})

    def test_chunks_that_fit_into_captured_sizes(self, probe):
        assert probe(tokens=300) == ([(True, 102), (True, 1)], {})
        streams, reasons = probe(tokens=600)
        assert streams == [(True, 102), (True, 1)]
        assert "600 tokens, and graphs are captured for 512" in "".join(reasons.values())
        assert probe(captured=0, tokens=300) == ([(True, 0), (True, 1)], {})

    @pytest.mark.parametrize(
        "engine, streams, words",
        [
            ({"marks": {}}, [], "takes no images, videos or audio"),
            ({"marks": {"image": ""}}, [], "what stands for image in a prompt is not known"),
            ({"marks": {"image": "", "video": "<v>"}}, [(True, 0), (True, 1)], "stands for image"),
            ({"refused": "too long"}, [], "refused: too long"),
            ({"cuts": False}, [(True, 0)], "needs chunked prefill"),
            ({"tokens": 2000, "captured": 0}, [(True, 0)], "takes 2000 tokens"),
        ],
    )
    def test_what_cannot_be_asked(self, probe, engine, streams, words):
        found, reasons = probe(**engine)
        assert found == streams and words in "".join(reasons.values())


class TestModes:
    def test_a_release_may_lack_one(self):
        assert BREAKABLE.missing("0.24.0", gpu=True) == ""
        assert "from 0.24.0 on" in BREAKABLE.missing("0.22.1+deepstack.2.cpu", gpu=True)
        assert BREAKABLE.missing("0.33.1.dev12+g1234", gpu=False) == "needs a GPU"
        assert DEFAULT.missing("0.20.0", gpu=False) == ""


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

    def test_modes_and_a_compilation_config(self, capsys):
        with pytest.raises(SystemExit) as end:
            main(["check", "--model", "m", "--modes", "full", "--compilation-config={}"])
        assert end.value.code == 2 and "--modes piecewise and full" in capsys.readouterr().err

    def test_a_mode_that_there_is_not(self, capsys):
        with pytest.raises(SystemExit):
            main(["check", "--model", "m", "--modes", "none"])
        assert "breakable" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "option",
        [
            "--enforce-eager",
            "--enforce_eager",
            "--enforce-eag",
            "--no_enforce_eager",
            "--logprobs_mode",
            "--max-logprobs=5",
            "--num-samples=0",
            "--max-tokens=0",
        ],
    )
    def test_options_that_undo_the_check(self, capsys, option):
        with pytest.raises(SystemExit) as end:
            main(["check", "--model", "m", option])
        assert end.value.code == 2 and option.split("=")[0] in capsys.readouterr().err

    def test_earlier_files_are_gone_and_nothing_is_left(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        (tmp_path / "check.xml").write_text("an earlier check's")
        samples = tmp_path / "none.jsonl"
        options = ["--samples", str(samples), "--junit", str(tmp_path / "check.xml")]
        assert "cannot be read" in self.fails(capsys, "--model", "m", *options)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_is_no_file(self, capsys, tmp_path):
        assert "a folder" in self.fails(capsys, "--model", "m", "--html", str(tmp_path))

    def test_failed_worker_shows_its_own_error(self, tmp_path):
        job = Job("eager", "tests.parity.broken_worker", [], {"PYTHONPATH": "."}, tmp_path)
        with pytest.raises(
            UserError, match=r"eager failed with exit code 1:\nValueError: no such thing"
        ) as error:
            run([job], tmp_path / "job.json", Console(file=StringIO()), 1)
        assert str(job.log) in str(error.value)

    @pytest.mark.parametrize("at_once", [1, 2])
    def test_one_that_fails_later_does_not_stop_the_others(self, tmp_path, at_once):
        env = {"PYTHONPATH": "."}
        jobs = [
            Job(name, f"tests.parity.{worker}_worker", [], env, tmp_path)
            for name, worker in (("eager", "late"), ("full", "broken"), ("default", "late"))
        ]
        console = Console(file=StringIO())
        eager, full, default = outcomes(jobs, tmp_path / "job.json", console, at_once)
        assert isinstance(full, EngineError) and "ValueError: no such thing" in str(full)
        for one in (eager, default):
            assert len(one.runs) == 1 and "AssertionError: too many rows" in one.error
        with pytest.raises(EngineError, match=r"^full failed"):  # with which nothing is compared
            outcomes([jobs[1], jobs[0]], tmp_path / "job.json", console, at_once)

    def test_a_mistake_of_ours_is_no_verdict(self, capsys, monkeypatch):
        monkeypatch.setattr("vllm_deepstack.check.check.validate", lambda args, trees: 1 / 0)
        assert main(["check", "--model", "m"]) == 2
        assert "ZeroDivisionError" in capsys.readouterr().err

    def test_help_says_the_exit_codes(self):
        command = [sys.executable, "-m", "vllm_deepstack", "check", "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "0 it agrees, 1 it diverges or leaks, 2 the check could not run" in done.stdout
