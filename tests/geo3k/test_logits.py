"""Geo3K samples through real engines, compiled and eager: raw logits of the whole vocabulary.

By default the model that is shipped, and a tiny Qwen3-Omni, on Geo3K-nano. On the real ones:

    GEO3K_MODEL=Qwen/Qwen3-VL-2B-Instruct GEO3K_DATASET=hiyouga/geometry3k pytest -m gpu tests/geo3k
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.geo3k import UnreachableError
from benchmarks.geo3k.data import Question, load
from tests.fleet import DTYPE, NANO
from tests.serving.modes import cases
from tests.serving.soak import DifferenceError
from vllm_deepstack.check.compare import tolerance
from vllm_deepstack.check.modes import DEFAULT, EAGER
from vllm_deepstack.check.report import largest, report, show
from vllm_deepstack.check.run import Result, arm_job, reference_job, run, write_spec
from vllm_deepstack.check.samples import Sample

from . import NANO as FILES

MODEL = os.environ.get("GEO3K_MODEL", NANO)
DATASET = os.environ.get("GEO3K_DATASET", str(FILES / "data"))
SAMPLES = int(os.environ.get("GEO3K_NUM_SAMPLES", 16))
TEXT_ONLY = 4  # of the same questions, without their figures: the noise floor
MAX_TOKENS = 32
LONG = () if MODEL == NANO else ("--max-model-len", "4096")
CASES = [case for model in (MODEL, "qwen3_omni") for case in cases(model, common=LONG)]

gpu = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]


def sample(question: Question, folder: Path, figures: bool) -> Sample:
    paths = [str(folder / f"{question.number}-{k}.png") for k in range(len(question.images))]
    for path, image in zip(paths, question.images):
        image.save(path)
    parts = question.content(paths)
    if figures:
        content = [{"type": "image"} if part["type"] == "image" else part for part in parts]
        return Sample([{"role": "user", "content": content}], images=paths)
    text = [part for part in parts if part["type"] == "text"]
    return Sample([{"role": "user", "content": text}])


def write_samples(folder: Path, count: int, text_only: int) -> Path:
    """The job of the first `count` questions, and of some of their texts."""
    if (folder / "job.json").exists():
        return folder / "job.json"
    try:
        questions = load(DATASET, "test", count)
    except UnreachableError as error:
        pytest.skip(str(error))
    folder.mkdir(exist_ok=True)
    samples = [sample(question, folder, figures=True) for question in questions]
    samples += [sample(question, folder, figures=False) for question in questions[:text_only]]
    return write_spec(samples, False, MAX_TOKENS, folder)


def check(model: str, ours: Result, reference: Result, factor: int = 1) -> dict[str, Any]:
    """Shows the differences, and returns them as figures; `factor` times the tolerance agrees."""
    assert ours.meta["dtype"] == reference.meta["dtype"]
    limit = factor * tolerance(ours.meta["dtype"], reference.runs)
    found = report(model, reference, {"default": ours}, limit=limit)
    show([found], Console(width=120))
    arm = found["arms"][1]
    about = zip(found["samples"], arm["samples"], strict=True)
    differences = [difference for sample, difference in about if sample["images"]]
    assert all(sample["image_tokens"] for sample in found["samples"] if sample["images"])
    return {
        "model": model,
        "dtype": found["dtype"],
        "samples": len(differences),
        "wrong": sum(not difference["agrees"] for difference in differences),
        "largest": max(map(largest, differences)),
        "tokens_same": sum(difference["agreed"] for difference in differences),
        "tokens": sum(difference["steps"] for difference in differences),
        "text_only_largest": found["noise_floor"],
        "tolerance": found["tolerance"],
        "agrees": found["verdict"] == "agrees",
    }


def require(figures: dict[str, Any]) -> None:
    if not figures["agrees"]:
        raise DifferenceError(
            f"{figures['wrong']} of {figures['samples']} samples differ, by up to "
            f"{figures['largest']:.2g} (tolerance {figures['tolerance']:.2g}, text-only prompts "
            f"{figures['text_only_largest']:.2g})"
        )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=str(case),
            marks=[*gpu, pytest.mark.bites("stock"), pytest.mark.holds("newest")],
        )
        for case in CASES
    ],
)
def test_compiled_is_eager(case, fleet, figures):
    """D1, in every release up to 0.22.1 as released, and in every mode that it has."""
    served, eager = fleet.engine(case), fleet.engine(case.eager)
    spec = write_samples(fleet.folder / "geo3k", SAMPLES, TEXT_ONLY)
    reference = eager.sample(spec, fleet.kept(case.eager) / "geo3k.npz")
    found = check(case.model, served.sample(spec, fleet.kept(case) / "geo3k.npz"), reference)
    figures(what="Geo3K", mode=case.mode.name, **found)
    require(found)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.model.rpartition("/")[2], marks=gpu)
        for model in (MODEL, "qwen3_omni")
        for case in cases(model, modes=[EAGER], common=LONG)
    ],
)
def test_eager_is_transformers(case, fleet, figures):
    eager = fleet.engine(case)
    spec = write_samples(fleet.folder / "geo3k", SAMPLES, TEXT_ONLY)
    ours = eager.sample(spec, fleet.kept(case) / "geo3k.npz")
    job = reference_job(str(fleet.checkpoints[case.model]), DTYPE, fleet.kept(case))
    (transformers,) = run([job], spec, Console(stderr=True), at_once=1)
    transformers.meta["vllm"] = f"Transformers {transformers.meta['transformers']}"
    transformers.images, transformers.image_tokens = ours.images, ours.image_tokens
    found = check(case.model, ours, transformers, factor=2)  # it rounds in other places
    figures(what="Geo3K", mode="eager, to Transformers", **found)
    require(found)


@pytest.mark.engine
@pytest.mark.optional  # tests/engines compares the same, on another model
@pytest.mark.timeout(900)
def test_on_the_cpu(stock_tree, tmp_path):
    """In float32, a few samples: the fork agrees with eager and with Transformers, and 0.22.1 as
    released does not."""
    spec = write_samples(tmp_path / "geo3k", 4, 1)
    options = ["--model", str(FILES / "model"), "--dtype", "float32", "--max-model-len", "512"]
    options += ["--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    options += ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", "--seed", "0"]
    options += ["--gpu-memory-utilization", "0.3"]  # of a CPU's memory, too
    reference = reference_job(str(FILES / "model"), "float32", tmp_path)
    jobs = [
        arm_job(EAGER, None, options, tmp_path),
        arm_job(DEFAULT, None, options, tmp_path),
    ]
    more = [arm_job(DEFAULT, stock_tree, options, tmp_path, "stock"), reference]
    console = Console(stderr=True)
    eager, compiled = run(jobs, spec, console, at_once=2)
    stock, transformers = run(more, spec, console, at_once=2)
    found = check("geo3k_nano", compiled, eager)
    require(found)
    assert found["tokens_same"] == found["tokens"] == 4 * MAX_TOKENS
    transformers.images, transformers.image_tokens = eager.images, eager.image_tokens
    transformers.meta["vllm"] = "Transformers"
    require(check("geo3k_nano", eager, transformers))
    with pytest.raises(DifferenceError, match=r"^4 of 4 samples differ"):
        require(check("geo3k_nano", stock, eager))
