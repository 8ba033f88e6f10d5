"""On other vLLMs than the installed one: the contract holds on every release with the fork; and
the tests that are said to bite fail where they should, on vLLM as released and with
vllm-project/vllm#43617 alone. A test that cannot fail shows nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from tests.conftest import PR43617
from vllm_deepstack import releases
from vllm_deepstack.merged import FOLDER
from vllm_deepstack.patch.tree import Tree, public_version

DEFAULT = str(releases.default().version)
OTHERS = [str(version) for version in releases.releases() if str(version) != DEFAULT]
NEWEST = OTHERS[-1]
# Where one of the defects begins or ends.
BOUNDARIES = {"0.20.1", "0.23.0", "0.24.0", "0.28.0", "0.30.0", NEWEST}


def distinct() -> list[Any]:
    """The other releases. Those whose files another one has, to the byte, are optional."""
    found, seen = [], {str(releases.default().sources)}
    for version in reversed(OTHERS):
        again = str(releases.known(version).sources) in seen
        seen.add(str(releases.known(version).sources))
        found.append(pytest.param(version, marks=pytest.mark.optional) if again else version)
    return found


TOPICS = ("contract", "staging", "steps", "positions", "init")
FILES = {topic: str(Path(__file__).with_name(f"test_{topic}.py")) for topic in TOPICS}
# `__init__`s: where the releases differ; from 0.27 on, CPU kernels do not load beside the PyTorch
# that is installed here, but the newest has none.
INIT = {"0.20.1", DEFAULT, "0.25.1", NEWEST}
# What vLLM imports, imported once: each release's tests run in a fork of that process.
PRELOAD = ["torch._inductor", "transformers", "scipy.stats", "torchvision", "torchaudio", "openai"]
PRELOAD += ["fastapi", "xgrammar", "cv2", "aiohttp", "grpc", "opentelemetry.trace", "hypothesis"]


@pytest.fixture(scope="module")
def run_tests(tmp_path_factory):
    """Runs this folder's tests on the vLLM in a tree: (exit code, output)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run(tree: Path, *options: str) -> tuple[int, str]:
        log = tmp_path_factory.mktemp("log") / "pytest.log"
        version = str(public_version(tree))
        files = [file for topic, file in FILES.items() if topic != "init" or version in INIT]
        process = context.Process(target=run_pytest, args=(tree, log, (*options, *files)))
        process.start()
        process.join()
        assert process.exitcode is not None
        output = log.read_text()
        assert f" in {tree}" in output  # conftest.py says what is tested
        return process.exitcode, output

    return run


def run_pytest(tree: Path, log: Path, options: tuple[str, ...]) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)  # vLLM inspects models in a process of its own
    # A release for CUDA runs these tests as well; the newest one has no other.
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    # What vLLM knows of a model is kept by its file's hash, and read by other releases, too.
    os.environ["VLLM_CACHE_ROOT"] = str(log.parent / "cache")
    os.chdir(releases.ROOT)
    sys.exit(pytest.main(["-rX", "-p", "no:cacheprovider", "-p", "no:xdist", *options]))


def patched(tree: Path, folder: Path, *overlay: Path) -> Path:
    copy = shutil.copytree(tree, folder / "patched", copy_function=os.link)
    Tree(copy, *overlay).apply()
    return copy


def count(output: str, outcome: str) -> int:
    found = re.search(rf"(\d+) {outcome}\b", output)
    return int(found[1]) if found else 0


@pytest.mark.thinned
@pytest.mark.parametrize("version", distinct())
def test_contract_holds_on(version, run_tests, unpacked, tmp_path):
    """The merged files compile, they import, and the mixin's tests pass."""
    thin = conftest.THIN * (1 if version in BOUNDARIES else 4)
    code, output = run_tests(patched(unpacked(version), tmp_path), "--thin", str(thin))
    assert code == 0, output
    assert f"vLLM {version} in" in output
    assert count(output, "passed") >= 140


@pytest.mark.parametrize(
    "variant, version, fail",
    [
        ("stock", DEFAULT, 90),
        ("pr43617", DEFAULT, 80),
        ("newest", NEWEST, 80),
        ("0.20.1", "0.20.1", 3),
        ("0.25.1", "0.25.1", 2),
    ],
)
def test_broken_variants_break_the_contract(variant, version, fail, run_tests, unpacked, tmp_path):
    """Strictly: a test that passes there is a failure."""
    tree = unpacked(version)
    if (variant, version) == ("pr43617", DEFAULT):
        tree = patched(tree, tmp_path, PR43617)
    options = ["--bites", variant, "--hypothesis-profile=unshrunk", "--thin", str(conftest.THIN)]
    code, output = run_tests(tree, *options)
    assert code == 0, output
    assert count(output, "xfailed") >= fail


def model_infos(tree: Path, folder: Path, plugin: bool, answer: Path) -> None:
    """What vLLM's registry learns of each class that the plugin serves, in a process of its own."""
    sys.path[:0] = [str(tree), str(folder)]  # the rival is found before the plugin
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    os.environ["VLLM_CACHE_ROOT"] = str(folder / "cache")
    os.environ["DEEPSTACK_DISABLE"] = str(int(not plugin))
    with (folder / f"{plugin}.log").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from tests.deepstack.bare_models import CLASSES, load
    from vllm.model_executor.models.registry import _ModelInfo
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = {}
    for name, (module, _) in CLASSES.items():
        if (tree / f"{module.replace('.', '/')}.py").is_file():
            cls = load(name)
            info = vars(_ModelInfo.from_model_cls(cls))
            file = str(sys.modules[cls.__module__].__file__)
            found[name] = {"info": {key: str(value) for key, value in info.items()}, "file": file}
    answer.write_text(json.dumps(found))


@pytest.mark.parametrize("version", [DEFAULT, NEWEST])
def test_the_plugin_is_first_and_the_registry_learns_the_same(version, unpacked, tmp_path):
    """vLLM keeps what it learns of a class by the hash of the installed file, which the plugin does
    not change. A plugin that vLLM calls first imports a model: it is the fixed one."""
    (tmp_path / "rival.py").write_text(
        "def register():\n    import vllm.model_executor.models.qwen3_vl\n"
    )
    info = tmp_path / "aaa_rival-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: aaa-rival\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\naaa = rival:register\n")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    found = []
    for plugin in (False, True):
        answer = tmp_path / f"{plugin}.json"
        arguments = (unpacked(version), tmp_path, plugin, answer)
        process = context.Process(target=model_infos, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{plugin}.log").read_text()
        found.append(json.loads(answer.read_text()))
    released, fixed = found
    assert len(released) >= 4
    for name in released:
        assert fixed[name]["info"] == released[name]["info"]
        assert released[name]["file"].startswith(str(unpacked(version)))
    served = {name for name in fixed if fixed[name]["file"].startswith(f"{FOLDER}/")}
    assert served >= {"qwen3_vl", "qwen3_omni_moe_thinker", "granite4_vision"}
