"""`status`: what a vLLM has of the defects, by the contents of its files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import jsonschema
import pytest

from vllm_deepstack import STATE, releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.merged import table
from vllm_deepstack.patch.status import Status, status
from vllm_deepstack.patch.tree import Tree

from .defects import KINDS, MODELS, judged

SCHEMA = json.loads((releases.ROOT / "docs/schemas/status.json").read_text())
QWEN3_VL = KINDS["Qwen3-VL"].file


@pytest.mark.parametrize("version", ["0.20.0", "0.22.1", "0.27.1", "0.33.0"])
def test_it_says_what_the_rules_find(release_sources, version):
    root = release_sources(version)
    before = status(root)
    found = {
        model: {name for name, state in states.items() if state == "present"}
        for model, states in judged(root).items()
    }
    assert {model: {*states} for model, states in before.models.items()} == found
    assert (before.code, before.overlay, before.fix) == (1, "not applied", None)
    Tree(root).apply()
    after = status(root)
    assert (after.code, after.overlay, after.fix) == (0, "applied", "patch")
    left = judged(root)
    for model, states in after.models.items():
        assert states.keys() >= found[model]  # of releases that become the same
        for name, state in states.items():
            here = left[model].get(name) == "present"
            assert state == ("left by the overlay" if here else "fixed"), (model, name)
            assert here == any(f"{model}: {name} is" in text for text in after.warnings)
    jsonschema.validate(after.json(), SCHEMA)


def test_in_words(release_sources, capsys):
    root = release_sources("0.30.0")
    assert main(["status", str(root)]) == 1
    text = capsys.readouterr().out
    assert text.startswith(f"vLLM 0.30.0 in {root}\n")
    about = dict(re.findall(r"^  (D\d+) .*\n((?:     .*\n)+)", text, re.MULTILINE))
    assert "  in: MOSS-Audio\n" in about["D1"]
    assert "  in: Qwen3-VL, Qwen3-VL-MoE, Qwen3-Omni, Cohere Compass, Granite 4 Vis" in about["D2"]
    assert f"or: vllm-deepstack apply {root}" in text
    Tree(root).apply()
    assert main(["status", str(root)]) == 0
    text = capsys.readouterr().out
    about = dict(re.findall(r"^  (D\d+) .*\n((?:     .*\n)+)", text, re.MULTILINE))
    assert (
        "  as released: Qwen3-VL, Qwen3-VL-MoE, " in about["D2"] and "  now: fixed\n" in about["D2"]
    )
    assert main(["status", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["release"], told["overlay"]) == ("clean", "0.30.0", "applied")
    assert told["models"]["Cohere Compass"]["D2"] == "fixed"
    assert (told["fix"], told["plugin"]) == ("patch", None)
    jsonschema.validate(told, SCHEMA)


def test_files_count_not_the_version(release_sources):
    """A release that says it is another, and one that nobody knows yet."""
    root = release_sources("0.22.1")
    version = root / "vllm" / "_version.py"
    for name in ("0.33.0", "0.99.0"):
        version.write_text(f"__version__ = '{name}'\n")
        found = status(root)
        assert found.models["Qwen3-VL"]["D1"] == "present" and "D2" not in found.models["Qwen3-VL"]
    version.unlink()
    assert status(root).models["Qwen3-VL"]["D1"] == "present"


def test_an_edited_file(release_sources, capsys):
    """Of its model and of those that inherit from it, it cannot be told: lint has a hint."""
    root = release_sources("0.33.0")
    with (root / QWEN3_VL).open("a") as file:
        file.write("# ours\n")
    assert main(["status", str(root)]) == 1
    text = capsys.readouterr().out
    why = f"{root / QWEN3_VL} is not from a release that vllm-deepstack knows"
    assert f"cannot tell of Qwen3-VL: {why}\n" in text
    assert f"cannot tell of Qwen3-VL-MoE: {why}\n" in text
    assert f"a hint, by lint: DS002 in {root / QWEN3_VL}" in text
    found = status(root)
    assert found.unknown.keys() == {"Qwen3-VL", "Qwen3-VL-MoE"}
    assert found.models["Qwen3-Omni"]["D2"] == "present"
    assert status(root, models=["Qwen3-VL"]).code == 2
    jsonschema.validate(found.json(), SCHEMA)


def test_a_file_that_was_merged_untested(release_sources, capsys):
    """Is told by the manifest."""
    root = release_sources("0.33.0")
    with (root / QWEN3_VL).open("a") as file:
        file.write("# ours\n")
    assert main(["apply", str(root)]) == 0
    assert "not tested" in capsys.readouterr().err
    found = status(root)
    assert (found.code, found.unknown) == (0, {})
    assert found.models["Qwen3-VL"]["D2"] == "fixed"
    assert [text for text in found.warnings if str(root / QWEN3_VL) in text and "tested" in text]
    assert main(["revert", str(root)]) == 0
    assert (root / QWEN3_VL).read_text().endswith("# ours\n")


def test_a_runner_of_no_release(release_sources):
    """The fixes were not tested with it."""
    root = release_sources("0.33.0")
    Tree(root).apply()
    assert not [text for text in status(root).warnings if "runner" in text]
    runner = next(iter(table().runners))
    with (root / runner).open("a") as file:
        file.write("# ours\n")
    (text,) = [text for text in status(root).warnings if "runner" in text]
    assert str(root / runner) in text


@pytest.mark.parametrize("how", ["gone", "edited"])
def test_a_merged_file_needs_the_mixin(release_sources, how):
    """Without it, vLLM cannot import the models."""
    root = release_sources("0.33.0")
    Tree(root).apply()
    mixin = root / MODELS / "deepstack.py"
    mixin.unlink() if how == "gone" else mixin.write_text("x = 1\n")
    found = status(root)
    assert found.code == 2 and "Qwen3-VL" in found.unknown
    assert "Ernie 4.5-VL" in found.models  # it does not need it


def test_a_parent_that_is_gone(release_sources):
    root = release_sources("0.33.0")
    (root / QWEN3_VL).unlink()
    assert "is missing" in status(root).unknown["Qwen3-VL-MoE"][0]


def test_what_another_version_of_this_merged(release_sources):
    """Its original is a release's, and the file is not what this version makes of it."""
    root = release_sources("0.33.0")
    Tree(root).apply()
    file = root / QWEN3_VL
    file.write_text(file.read_text() + "# another version\n")
    manifest = root / STATE / "manifest.json"
    told = json.loads(manifest.read_text())
    told["files"][QWEN3_VL] = releases.sha256(file.read_bytes())
    manifest.write_text(json.dumps(told))
    assert "another version" in status(root).unknown["Qwen3-VL"][0]


def test_no_models(release_sources):
    root = release_sources("0.33.0")
    shutil.rmtree(root / MODELS)
    assert status(root).code == 2


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "vision_config": {"deepstack_visual_indexes": [8, 16, 24]},
}
NO_LEVELS = CONFIG | {"vision_config": {"deepstack_visual_indexes": []}}
THEIRS = CONFIG | {"architectures": ["Qwen3VLOfOursForConditionalGeneration"]}


@pytest.mark.parametrize(
    "named, model",
    [
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3-VL-MoE"),
        ("Qwen3OmniMoeForConditionalGeneration", "Qwen3-Omni"),
        ("OpsColQwen3Model", "Qwen3-VL"),  # by what its class inherits
        ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie 4.5-VL"),
        (CONFIG, "Qwen3-VL"),
        (THEIRS, "Transformers backend"),
        ("Qwen2_5_VLForConditionalGeneration", None),
        (NO_LEVELS, None),
        (CONFIG | {"vision_config": {"depth": 27}}, "Qwen3-VL"),  # its class has a default
        (CONFIG | {"architectures": ["Qwen3VLForSequenceClassification"]}, "Qwen3-VL"),
        (CONFIG | {"architectures": ["Foo", "Qwen3VLForConditionalGeneration"]}, "Qwen3-VL"),
    ],
    ids=str,
)
def test_one_model(tmp_path, stock_tree, capsys, named, model):
    if isinstance(named, dict):
        (tmp_path / "config.json").write_text(json.dumps(named))
        named = str(tmp_path)
    code = main(["status", str(stock_tree), "--model", named, "--json"])
    text = capsys.readouterr().out
    if model is None:
        told = json.loads(text)
        jsonschema.validate(told, SCHEMA)
        assert (code, told["verdict"], told["models"]) == (0, "clean", {})
    else:
        assert code == 1 and [*json.loads(text)["models"]] == [model]


@pytest.mark.parametrize("named", ["nobody/nothing", "{}", "a/b/c/d", "Qwen3VLX", "[1]"])
def test_a_model_that_is_not_there(tmp_path, stock_tree, capsys, named):
    if named in ("{}", "[1]"):
        (tmp_path / "config.json").write_text('{"architectures": [1]}' if named == "[1]" else "{}")
        named = str(tmp_path)
    assert main(["status", str(stock_tree), "--model", named]) == 2
    assert named in capsys.readouterr().err


def test_a_model_that_the_backend_alone_serves(release_sources, tmp_path):
    """What the overlay leaves is then all that there is."""
    root = release_sources("0.22.1")
    Tree(root).apply()
    assert status(root).code == 0
    assert status(root, models=["Transformers backend"]).code == 1


@pytest.mark.parametrize(
    "package", ["vllm_omni", "vllm_ascend", "tpu_inference", "vllm_gaudi", "vllm_rbln"]
)
def test_packages_that_register_or_replace(release_sources, package):
    root = release_sources("0.33.0")
    names = [text.split()[0] for text in status(root).warnings]
    assert package.replace("_", "-") not in names
    (root / package).mkdir()
    names = [text.split()[0] for text in status(root).warnings]
    assert package.replace("_", "-") in names


@pytest.mark.parametrize("broken", ["missing", "syntax"])
def test_cannot_tell(release_sources, broken):
    root = release_sources("0.22.1")
    if broken == "missing":
        (root / "vllm/__init__.py").unlink()
        assert status(root).code == 2
        return
    (root / QWEN3_VL).write_text("def\n")
    found = status(root)
    assert "Qwen3-VL" in found.unknown and found.models["Qwen3-Omni"]["D1"] == "present"


def test_interrupted(release_sources):
    root = release_sources("0.22.1")
    Tree(root).apply()
    manifest = root / STATE / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"applied"', '"applying"'))
    found = status(root)
    assert (found.code, found.overlay) == (2, "interrupted")
    Tree(root).revert()
    assert status(root).overlay == "not applied"


def test_what_an_earlier_version_merged(release_sources):
    """Is known: what that version fixed, and what it did not."""
    root = release_sources("0.33.0")
    files = [f for f in table().earlier.values() if f.path == QWEN3_VL and f.version == "2"]
    by_hash = next(file for file in files if "D2" in file.fixes["Qwen3-VL"])
    assert "D14" in by_hash.fixes["Qwen3-VL"] and "D18" in by_hash.left["Qwen3-VL"]
    (root / QWEN3_VL).write_bytes(merged_by_an_earlier_version := b"VERSION = 2\n")
    table().earlier[releases.sha256(merged_by_an_earlier_version)] = by_hash
    found = status(root)
    assert (found.code, found.overlay) == (1, "another version")
    states = found.models["Qwen3-VL"]
    assert (states["D2"], states["D18"]) == ("fixed", "present")
    assert found.models["Qwen3-Omni"]["D2"] == "present"


def test_the_installed_vllm():
    """Without a tree, that of this Python: here, the fork's wheel."""
    command = [sys.executable, "-m", "vllm_deepstack", "status", "--json"]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["fix"] == "wheel"


def test_no_vllm(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "no vLLM there" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["apply", str(tmp_path), "--json"])


def of_graphs(found: Status) -> list[str]:
    return [text for text in found.warnings if "graphs" in text]


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_graphs_from_before_the_patch(release_sources, monkeypatch, tmp_path, when):
    """Said only where vLLM would take them, or would refuse to start without them."""
    root, cache_dir = release_sources("0.22.1"), tmp_path / "given"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    Tree(root).apply()
    graphs = [
        tmp_path / "torch_compile_cache/torch_aot_compile/0123/rank_0_0/model",
        cache_dir / "rank_0_0/backbone/vllm_compile_cache.py",
    ]
    for graph in graphs:
        graph.parent.mkdir(parents=True)
        graph.touch()
        shift = {"before": -60, "after": 60}[when]
        os.utime(graph, (time.time() + shift, time.time() + shift))
    assert of_graphs(status(root)) == []
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    found = status(root, cache_dir=cache_dir)
    assert found.code == 0
    if when == "after":
        assert of_graphs(found) == []
    else:
        refused, taken = of_graphs(found)
        assert "VLLM_FORCE_AOT_LOAD=1" in refused and str(cache_dir) in taken
        assert f"warning: {taken}" in found.lines()


def test_no_patch_no_warning(release_sources, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    assert of_graphs(status(release_sources("0.33.0"), cache_dir=tmp_path)) == []
