"""D1 on real CPU engines: the stock release shows it, the fork does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PR43617
from vllm_deepstack import __version__, releases
from vllm_deepstack.check.report import leaked
from vllm_deepstack.check.samples import builtin
from vllm_deepstack.patch.tree import Tree

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODELS = ["qwen3_vl", "qwen3_omni"]
RAW = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>find x<|im_end|>\n"
    "<|im_start|>assistant\n"
)
SMALL = ["--max-model-len", "512", "--max-num-batched-tokens", "512", "--max-num-seqs", "16"]
# The CPU build of vLLM cannot run Omni's audio tower with a CUDA build of PyTorch.
LIMITS = {"qwen3_vl": {"image": 2, "video": 0}, "qwen3_omni": {"image": 2, "video": 0, "audio": 0}}


SAYS = f"vllm-deepstack {__version__}: Qwen3"


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    """Four image prompts, one of them with two images and one raw, and a text prompt."""
    folder = tmp_path_factory.mktemp("samples")
    lines: list[dict] = [{"messages": s.messages, "images": s.images} for s in builtin(5, folder)]
    lines[1] = {"prompt": RAW, "images": lines[1]["images"]}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "samples.jsonl"


@pytest.fixture(scope="session")
def stock_cache(tmp_path_factory) -> Path:
    """vLLM's cache, warmed by the stock release's engines."""
    return tmp_path_factory.mktemp("stock-cache")


@pytest.fixture
def parity(models, samples, tmp_path):
    """Runs the check: (exit code, report)."""

    def run(
        model: str, *options: object, cache: Path | None = None, **more: str
    ) -> tuple[int, dict]:
        command = [sys.executable, "-m", "vllm_deepstack", "check", "--model", models[model]]
        command += [
            "--dtype",
            "float32",
            "--samples",
            samples,
            "--side-by-side",
            "--logs",
            tmp_path / "logs",
            "--json",
            tmp_path / "report.json",
        ]
        command += [*SMALL, "--limit-mm-per-prompt", json.dumps(LIMITS[model]), *options]
        env = (
            os.environ
            | {
                "VLLM_CACHE_ROOT": str(cache or tmp_path / "cache"),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            }
            | more
        )
        done = subprocess.run(
            [str(part) for part in command],
            cwd=releases.ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stderr
        print(done.stdout)
        return done.returncode, json.loads((tmp_path / "report.json").read_text())

    return run


def differences(report: dict, images: bool, arm: int = 1, to: str = "samples") -> list[float]:
    """Of the samples with or without images: of the compiled engine (1) or the eager one (0)."""
    return [
        max(difference["first"], difference["decode"] or 0)
        for sample, difference in zip(report["samples"], report["arms"][arm][to], strict=True)
        if bool(sample["images"]) == images
    ]


# An engine's start is most of a test's time: `make test` has one model of each. The cache that the
# plugin meets is one that the release has warmed.
OMNI_OPTIONAL = ["qwen3_vl", pytest.param("qwen3_omni", marks=pytest.mark.optional)]
VL_OPTIONAL = [pytest.param("qwen3_vl", marks=pytest.mark.optional), "qwen3_omni"]


@pytest.mark.parametrize("model", OMNI_OPTIONAL)
def test_stock_release_loses_the_features(parity, model, stock_tree, stock_cache):
    code, report = parity(model, "--vllm", stock_tree, cache=stock_cache)
    assert code == 1
    assert report["vllm"] == str(releases.default().version)
    # Compiled, and where the whole prompt is replayed, images lose their levels. In Python, which
    # reads them, a replayed step leaves them to the next (D2).
    verdicts = {arm["mode"]: arm["verdict"] for arm in report["arms"]}
    assert verdicts["default"] == verdicts["replay"] == "diverges"
    assert verdicts["eager"] == "agrees" and verdicts["replay-decode"] == "leaks"
    assert report["arms"][1]["alone"]["differ"] > 10  # short requests with images
    assert min(report["shares"]["blank"], report["shares"]["levels"]) > 0.5
    assert len(differences(report, images=True)) == 4
    assert min(differences(report, images=True)) > 0.5
    assert max(differences(report, images=False)) < 1e-3


def changed(arm: dict, stream: str) -> int:
    (requests,) = [s["requests"] for s in arm["leaks"]["streams"] if s["name"] == stream]
    return sum(request["changed"] for request in requests)


def test_43617_leaks(parity, stock_tree, tmp_path):
    """D2, on one engine: with the change that fixed D1, what an image left is in others' texts."""
    tree = shutil.copytree(stock_tree, tmp_path / "pr43617", copy_function=os.link)
    Tree(tree, PR43617).apply()
    code, report = parity("qwen3_vl", "--vllm", tree, "--modes", "replay", "replay-decode")
    assert code == 1
    eager, *replays = report["arms"]
    assert eager["verdict"] == "agrees" and leaked(eager) == 0
    for arm in replays:
        assert arm["verdict"] == "leaks" and arm["alone"]["differ"] == 0
        assert changed(arm, "features staged in each row, then text") > 0
    assert leaked(replays[0]) > 15
    assert changed(replays[0], "the same text again, from the prefix cache") == 2


def agrees(report: dict) -> None:
    """Compiled with eager, and eager with Transformers. Of Omni, too: D12."""
    assert all(s["image_tokens"] > 0 for s in report["samples"] if s["images"])
    assert all(s["agreed"] == s["steps"] == 8 for s in report["arms"][1]["samples"])
    assert min(report["shares"]["blank"], report["shares"]["levels"]) > 0.5
    assert max(differences(report, True) + differences(report, False)) < 1e-3
    for images in (False, True):
        assert max(differences(report, images, arm=0, to="to_transformers")) < 1e-3


@pytest.mark.parametrize("model", VL_OPTIONAL)
def test_fork_agrees_with_eager_and_with_transformers(parity, model):
    code, report = parity(model, "--reference")
    assert code == 0
    assert "deepstack" in report["vllm"]
    agrees(report)


@pytest.mark.parametrize("model", OMNI_OPTIONAL)
def test_the_plugin_fixes_the_stock_release(parity, model, stock_tree, stock_cache, tmp_path):
    """In every process; the cache is warm with what the release compiled, and knows its models."""
    on = {"DEEPSTACK_DISABLE": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    options = ["--vllm", stock_tree, "--reference"]
    code, report = parity(model, *options, cache=stock_cache, **on)
    assert code == 0
    assert report["vllm"] == f"{releases.default().version} with vllm-deepstack"
    agrees(report)
    for name in ("eager", "default"):
        log = (tmp_path / f"logs/{name}.log").read_text().splitlines()
        (said,) = (line for line in log if SAYS in line)  # by the process that runs the model
        assert "(Worker pid=" in said and "has the DeepStack fixes (D1, " in said


@pytest.mark.optional
@pytest.mark.parametrize("model", MODELS)
def test_patched_stock_release_does_not_meet_its_old_graphs(
    parity, model, stock_tree, stock_cache, tmp_path
):
    """The version is the stock release's, and the cache is warm with what it compiled."""
    assert list(stock_cache.glob("torch_compile_cache/*")), (
        "run the test of the stock release first"
    )
    tree = shutil.copytree(stock_tree, tmp_path / "patched", copy_function=os.link)
    Tree(tree).apply()
    code, report = parity(model, "--vllm", tree, cache=stock_cache)
    assert code == 0
    assert report["vllm"] == f"{releases.default().version} with vllm-deepstack"
    assert max(differences(report, True) + differences(report, False)) < 1e-3


@pytest.mark.optional
def test_model_without_images(tmp_path):
    """Any model will do: the built-in samples go without their images."""
    import transformers

    from tests import tiny_models

    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = None
    config = tiny_models.text_config(tokenizer) | {"rope_scaling": None}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
    tiny_models.draw_weights(model, 0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "vllm_deepstack", "check", "--model", tmp_path / "model"]
    command += [*SMALL, "--dtype", "float32", "--num-samples", "2", "--max-tokens", "3", "--json"]
    env = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [str(part) for part in [*command, "--side-by-side", "--reference"]],
        cwd=releases.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert [s["images"] for s in report["samples"]] == [0, 0]
    assert max(differences(report, False) + differences(report, False, 0, "to_transformers")) < 1e-3


def test_model_that_vllm_cannot_load(tmp_path):
    """vLLM's own error is shown."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "nonsense", "architectures": ["NonsenseForCausalLM"]}'
    )
    command = [sys.executable, "-m", "vllm_deepstack", "check", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "eager failed" in done.stderr and "nonsense" in done.stderr
