"""`status`: the table release × defect, read from each release's own code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from packaging.version import Version

from tests.conftest import PR43617
from vllm_deepstack import STATE, releases
from vllm_deepstack.__main__ import main
from vllm_deepstack.merged import table as files
from vllm_deepstack.patch.defects import CONFIG, DEFECTS, KINDS, MODELS
from vllm_deepstack.patch.status import Status, status
from vllm_deepstack.patch.tree import Tree

from . import table
from .table import statuses

RELEASES = [str(version) for version in releases.releases()]
# Releases and defects as the project's design has them, measured or read.
PRESENT = {
    "D1": ("0.20.0", "0.33.0"),  # from 0.23 on MOSS-Audio's alone
    "D2": ("0.20.0", "0.33.0"),  # up to 0.22.1 Granite's and Ernie's alone
    "D3": ("0.23.0", "0.33.0"),  # from 0.28 on Compass's alone
    "D7": ("0.20.0", "0.33.0"),
    "D8": ("0.22.0", "0.23.0"),
    "D9": ("0.20.0", "0.33.0"),
    "D10": ("0.20.0", "0.20.1"),
    "D11": ("0.20.0", "0.29.0"),
    "D12": ("0.20.0", "0.33.0"),
    "D13": ("0.20.0", "0.33.0"),
    "D14": ("0.21.0", "0.33.0"),
    "D15": ("0.20.0", "0.33.0"),
    "D16": ("0.20.0", "0.33.0"),
    "D17": ("0.20.0", "0.33.0"),
    "D18": ("0.20.0", "0.33.0"),
    "D19": ("0.20.0", "0.33.0"),
    "D20": ("0.20.0", "0.32.0"),
    "D21": ("0.20.0", "0.25.1"),
}
QWEN = ("Qwen3-VL", "Qwen3-VL-MoE", "Qwen3-Omni")
OF_QWEN = {"D1": ("0.20.0", "0.22.1"), "D2": ("0.23.0", "0.33.0"), "D3": ("0.23.0", "0.27.1")}
SINCE = {"MOSS-Audio": "0.24.0", "Cohere Compass": "0.30.0"}
# The overlay has no fix of these there: read, and said as a warning.
LEFT = {
    ("Transformers backend", "D16"): ("0.20.0", "0.31.0"),
    ("Qwen3-VL", "D18"): ("0.20.0", "0.21.0"),
    ("Qwen3-VL-MoE", "D18"): ("0.20.0", "0.21.0"),
}

SCHEMA = json.loads((releases.ROOT / "docs/schemas/status.json").read_text())


def within(version: str, first: str, last: str) -> bool:
    return Version(first) <= Version(version) <= Version(last)


def present(root: Path) -> set[str]:
    found = status(root)
    assert found.problem is None
    return set(table.present(found))


@pytest.fixture(scope="module")
def found(release_sources):
    return statuses({version: release_sources(version) for version in RELEASES})


@pytest.mark.parametrize("version", RELEASES)
def test_before_and_after(found, version):
    before, after = found[version]
    assert before.problem is None
    gone_with_moss = {"D1"} if within(version, "0.23.0", "0.23.0") else set()
    gone_with_compass = {"D3"} if within(version, "0.28.0", "0.29.0") else set()
    expected = {name for name, span in PRESENT.items() if within(version, *span)}
    expected -= gone_with_moss | gone_with_compass
    assert set(table.present(before)) == expected
    for name, states in before.models.items():
        for defect, state in states.items():
            _, released = DEFECTS[defect].models[name]
            there = "latent" if DEFECTS[defect].latent else "present"
            assert (state == there) == released.contains(version), (name, defect)
    assert (after.problem, after.code, after.overlay) == (None, 0, "applied")
    assert {name for name, state in after.defects.items() if state == "latent"} == {"D5"}
    left = {pair for pair, span in LEFT.items() if within(version, *span)}
    for name, defect in left:
        assert after.models[name][defect] == "left by the overlay"
        assert any(name in text and f": {defect} is" in text for text in after.warnings)
    gone = [
        (name, defect)
        for name, states in before.models.items()
        for defect, state in states.items()
        if state == "present" and (name, defect) not in left
    ]
    sources = releases.known(version).sources
    fixes = [files().files[path][sha].fixes for path, sha in sources.items()]
    by_file = {(model, name) for of in fixes for model, found in of.items() for name in found}
    # 0.33.0 has files of 0.32.0, and ended D20 elsewhere.
    said = {pair for pair in gone if version != "0.32.0" or pair[1] != "D20"}
    assert said <= by_file <= set(gone)
    for name, states in before.models.items():
        fixed = {d for d, state in after.models[name].items() if state == "fixed by the overlay"}
        marked = {d for d, state in states.items() if state in table.MARKS}
        latent = {"D5"} if name == "Granite 4 Vision" else set()
        assert fixed == {d for d in marked if (name, d) not in left} - latent


@pytest.mark.parametrize("version", RELEASES)
def test_by_model(found, version):
    """A class that a release lacks is not there."""
    before, _ = found[version]
    for name, since in SINCE.items():
        assert (name in before.models) == (Version(version) >= Version(since))
    for name in QWEN:
        for defect, span in OF_QWEN.items():
            there = before.models[name][defect] == "present"
            assert there == within(version, *span), (name, defect)
    assert before.models["Granite 4 Vision"]["D2"] == "present"


def test_docs_have_the_tables(found):
    """`python -m tests.overlay.table` prints them."""
    text = (releases.ROOT / "docs/defects.md").read_text()
    assert table.table(found) in text
    assert table.models_table(found) in text


def test_pull_request_43617_trades_defects(release_sources):
    root = release_sources("0.22.1")
    before = status(root).models["Qwen3-VL"]
    Tree(root, PR43617).apply()
    after = status(root).models["Qwen3-VL"]
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {"D1": "fixed by the overlay", "D2": "present", "D3": "present"} | {
        "D4": "latent"
    }


def test_states_in_words(release_sources, capsys):
    root = release_sources("0.30.0")
    assert main(["status", str(root)]) == 1
    text = capsys.readouterr().out
    assert text.startswith(f"vLLM 0.30.0 in {root}\n")
    about = dict(re.findall(r"^  (D\d+) .*\n((?:     .*\n)+)", text, re.MULTILINE))
    assert "  present: MOSS-Audio\n" in about["D1"]
    assert "  fixed upstream: Qwen3-VL, Qwen3-VL-MoE, Qwen3-Omni\n" in about["D1"]
    assert "  present: Qwen3-VL, Qwen3-VL-MoE, Qwen3-Omni, Cohere Compass, Granite" in about["D2"]
    assert "  latent: Qwen3-VL, " in about["D5"]
    assert f"or: vllm-deepstack apply {root}" in text
    Tree(root).apply()
    assert main(["status", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["release"], told["overlay"]) == ("clean", "0.30.0", "applied")
    assert told["defects"]["D2"] == "fixed by the overlay"
    assert told["models"]["Cohere Compass"]["D2"] == "fixed by the overlay"
    assert (told["fix"], told["plugin"]) == ("patch", None)
    jsonschema.validate(told, SCHEMA)


def test_code_counts_not_the_version(release_sources):
    """A release that says it is another, and one that nobody knows yet."""
    root = release_sources("0.22.1")
    version = root / "vllm" / "_version.py"
    for name in ("0.33.0", "0.99.0"):
        version.write_text(f"__version__ = '{name}'\n")
        assert status(root).models["Qwen3-VL"]["D1"] == "present"
        assert status(root).models["Qwen3-VL"]["D2"] == "fixed"
    version.unlink()
    assert "D1" in present(root)


def edit(root: Path, file: str, pattern: str, new: str) -> None:
    text = (root / file).read_text()
    changed, count = re.subn(pattern, new, text, flags=re.MULTILINE)
    assert count == 1, (file, pattern)
    (root / file).write_text(changed)


def clear_first(root: Path, file: str) -> None:
    """As somebody else might: in `embed_input_ids`, and no more in `forward`."""
    clear = "        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)\n"
    edit(
        root,
        file,
        r"(    def embed_input_ids\(\n(?:.+\n)*?    \) -> torch.Tensor:\n)",
        rf"\g<1>{clear}",
    )
    edit(root, file, r"self\._clear_deepstack_input_embeds\(inputs_embeds\.size\(0\)\)", "pass")


def clear_always(root: Path, file: str) -> None:
    """Without the early return, so that a captured graph clears."""
    edit(
        root,
        file,
        r"^        if getattr\(self, \"deepstack_input_embeds_num_tokens\", 0\) == 0:\n +return\n"
        r"(?=\n        # clear)",
        "",
    )


@pytest.mark.parametrize("fix", [clear_first, clear_always])
@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3-Omni", "Cohere Compass"])
def test_the_smallest_fixes_of_d2_count(release_sources, fix, name):
    """Both were run on a GPU, and leave no request wrong."""
    root = release_sources("0.33.0")
    assert status(root).models[name]["D2"] == "present"
    fix(root, KINDS[name].file)
    found = status(root)
    assert found.problem is None
    assert found.models[name]["D2"] == "fixed"
    assert found.models[name]["D7"] == "present"


def test_buffers_that_are_never_bound_again_have_no_d5(release_sources):
    """Whatever they are called: not the fork's names, but the code is judged."""
    root = release_sources("0.33.0")
    file = root / KINDS["Qwen3-Omni"].file
    text = file.read_text()
    begin = text.index("    def _resize_deepstack_input_embeds(")
    end = text.index("    def _set_deepstack_input_embeds(")
    file.write_text(
        text[:begin]
        + "    def _resize_deepstack_input_embeds(self, num_tokens: int) -> None:\n"
        + "        raise AssertionError(num_tokens)\n\n"
        + text[end:]
    )
    found = status(root).models["Qwen3-Omni"]
    assert found["D5"] == found["D4"] == "fixed"


ERNIE, EXPERTS = KINDS["Ernie 4.5-VL"].file, f"{MODELS}/ernie45_vl_moe.py"
GRANITE, MOSS = KINDS["Granite 4 Vision"].file, KINDS["MOSS-Audio"].file
QWEN3_VL, BACKEND = KINDS["Qwen3-VL"].file, KINDS["Transformers backend"].file


def before(file: str, line: str, new: str) -> tuple[str, str, str]:
    return file, f"(?=^{line})", new


COMPUTES = before(
    ERNIE,
    "        forward_kwargs = {",
    "        seen = torch.isin(input_ids, self._visual_token_ids_tensor_cache)\n"
    "        self.visual_token_mask = seen.reshape(-1, 1)\n",
)
COMPUTES_AGAIN = before(
    ERNIE,
    "        forward_kwargs = {",
    "        if self.visual_token_mask is not None:\n"
    "            self._set_visual_token_mask(input_ids)\n",
)
TAKES_BACK = before(
    ERNIE,
    "        if multimodal_embeddings is not None and len",
    "        self.visual_token_mask = None\n",
)
RUNS_BOTH = before(
    EXPERTS,
    r"        if visual_token_mask is not None and visual_token_mask\.all",
    "        if visual_token_mask is not None:\n"
    "            return torch.where(visual_token_mask, *self.both(hidden_states))\n",
)
READS = before(
    BACKEND,
    r"        return features\.pooler_output",
    "        levels = torch.cat(features.deepstack_features, -1)\n",
)
HANDS_ON = (
    BACKEND,
    r"return features\.pooler_output",
    "return torch.cat([features.pooler_output, levels], -1)",
)
WIDE = before(
    GRANITE,
    r"        assert multimodal_embeddings is not None\n        all_packed",
    "        multimodal_embeddings = [e for e in multimodal_embeddings if e.shape[-1] > lm_h]\n",
)
REFUSES_NARROW = before(
    GRANITE,
    r"        assert multimodal_embeddings is not None\n        all_packed",
    "        assert all(e.shape[-1] > lm_h for e in multimodal_embeddings)\n",
)
FILLS_UP = before(
    MOSS,
    r"        split_by_item = \[",
    "        embeddings = [self.fill(e, packed_hidden_size - e.size(-1)) for e in embeddings]\n",
)
SPLITS_WHATEVER_COMES = (MOSS, r"raise ValueError(?=\(\n +\"MOSS-Audio multimodal embed)", "print")
TELLS = before(
    QWEN3_VL,
    r"        return self\._recompute_mrope_positions\(",
    "        size = self.config.text_config.hidden_size\n"
    "        media = [e for e in multimodal_embeddings if e.size(1) > size]\n"
    "        if len(media) < len(multimodal_embeddings):\n"
    "            return self.with_text(media, multimodal_embeddings, mrope_positions)\n",
)
ASSERTS = before(
    QWEN3_VL,
    r"        return self\._recompute_mrope_positions\(",
    "        assert all(e.size(1) > 5 for e in multimodal_embeddings)\n",
)
NO_GRAPHS = before(
    QWEN3_VL,
    "        # Compute max_frames_per_video for budget",
    "        if self.multimodal_config.enable_mm_embeds:\n            modalities.clear()\n",
)
LATER_ONES = (
    GRANITE,
    r'getattr\(self, "_ds_layer_indices", \[\]\)',
    "[i for i in self._ds_layer_indices if i >= self.model.start_layer]",
)
NEVER_CLEARS = (GRANITE, r"buf\[:n\]\.zero_\(\)", "pass")
LIMITS = before(
    CONFIG,
    "        return hash_factors",
    '        factors["limits"] = self.multimodal_config.limit_per_prompt\n',
)
ONE_LIMIT = before(
    CONFIG,
    "        return hash_factors",
    '        factors["embeds"] = self.multimodal_config.enable_mm_embeds\n',
)
OWN_KEY = before(
    QWEN3_VL,
    "        self.use_deepstack = hasattr",
    "        limits = repr(multimodal_config.limit_per_prompt)\n"
    '        vllm_config.additional_config["limits"] = limits\n',
)


@pytest.mark.parametrize(
    "model, edits, fixed, kept",
    [
        pytest.param(*case, id=f"{case[0]}: {name}")
        for name, *case in [
            ("mask in forward, both experts", "Ernie 4.5-VL", [COMPUTES, RUNS_BOTH], "D2 D17", ""),
            ("mask in forward alone", "Ernie 4.5-VL", [COMPUTES], "D2", "D17"),
            ("both experts alone", "Ernie 4.5-VL", [RUNS_BOTH], "", "D2 D17"),
            ("only if a mask was left", "Ernie 4.5-VL", [COMPUTES_AGAIN, RUNS_BOTH], "", "D2 D17"),
            ("taken back first", "Ernie 4.5-VL", [TAKES_BACK], "D2", "D17"),
            ("levels handed on", "Transformers backend", [READS, HANDS_ON], "D16", ""),
            ("levels read and dropped", "Transformers backend", [READS], "", "D16"),
            ("the wide ones alone", "Granite 4 Vision", [WIDE], "D18", "D19"),
            ("still an exception", "Granite 4 Vision", [REFUSES_NARROW], "", "D18 D19"),
            ("filled up", "MOSS-Audio", [FILLS_UP], "D18", "D1"),
            ("split, whatever comes", "MOSS-Audio", [SPLITS_WHATEVER_COMES], "", "D1 D18"),
            ("told apart, no graphs", "Qwen3-VL", [TELLS, NO_GRAPHS], "D18", "D14"),
            ("told apart alone", "Qwen3-VL", [TELLS], "", "D14 D18"),
            ("no graphs alone", "Qwen3-VL", [NO_GRAPHS], "", "D14 D18"),
            ("still an exception", "Qwen3-VL", [ASSERTS, NO_GRAPHS], "", "D14 D18"),
            ("later ones, not cleared", "Granite 4 Vision", [LATER_ONES, NEVER_CLEARS], "D19", ""),
            ("later ones alone", "Granite 4 Vision", [LATER_ONES], "", "D19"),
            ("not cleared alone", "Granite 4 Vision", [NEVER_CLEARS], "", "D19"),
            ("vLLM's own key", "Qwen3-VL", [LIMITS], "D20", ""),
            ("a key of the model's", "Qwen3-VL", [OWN_KEY], "D20", ""),
            ("a key without limits", "Qwen3-VL", [ONE_LIMIT], "", "D20"),
        ]
    ],
)
def test_fixes_and_half_fixes_of_others(release_sources, model, edits, fixed, kept):
    root = release_sources("0.32.0" if "D20" in fixed + kept else "0.33.0")
    expected = dict.fromkeys(fixed.split(), "fixed") | dict.fromkeys(kept.split(), "present")
    states = status(root).models[model]
    assert {states[name] for name in expected} == {"present"}
    for each in edits:
        edit(root, *each)
    found = status(root)
    assert found.problem is None
    assert {name: found.models[model][name] for name in expected} == expected


def test_what_the_overlay_leaves(release_sources):
    """Is said, and what to do instead; it is no part of the verdict."""
    root = release_sources("0.31.0")
    assert status(root).models["Transformers backend"]["D16"] == "present"
    Tree(root).apply()
    found = status(root)
    assert (found.code, found.defects["D16"]) == (0, "left by the overlay")
    text = "Transformers backend: D16 is as released here: serve DeepStack models without "
    assert f"warning: {text}--model-impl transformers" in found.text()
    jsonschema.validate(found.json(), SCHEMA)


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


def test_what_is_left_as_released(release_sources):
    """InternS1-Pro drops its levels: said, and no part of the verdict."""
    root = release_sources("0.33.0")
    Tree(root).apply()
    found = status(root)
    assert found.code == 0
    assert any(text.startswith("InternS1-Pro computes") for text in found.warnings)


@pytest.mark.parametrize("broken", ["missing", "renamed", "syntax"])
def test_cannot_tell(release_sources, broken, capsys):
    root = release_sources("0.22.1")
    file = root / MODELS / "qwen3_vl.py"
    if broken == "missing":
        file.unlink()
    elif broken == "syntax":
        file.write_text("def\n")
    else:
        file.write_text(file.read_text().replace("def _get_deepstack_input_embeds", "def _read"))
    assert main(["status", str(root)]) == 2
    text = capsys.readouterr().out
    assert "cannot tell: Qwen3-VL: " in text and str(file) in text
    found = status(root).models
    assert "Qwen3-VL" not in found and found["Qwen3-Omni"]["D1"] == "present"


def test_interrupted(release_sources):
    root = release_sources("0.22.1")
    Tree(root).apply()
    manifest = root / STATE / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"applied"', '"applying"'))
    found = status(root)
    assert (found.code, found.overlay) == (2, "interrupted")
    Tree(root).revert()
    assert status(root).overlay == "not applied"


def test_an_older_overlay(release_sources):
    root = release_sources("0.22.1")
    Tree(root).apply()
    with (root / MODELS / "deepstack.py").open("a") as file:
        file.write("# older\n")
    assert status(root).overlay == "another version"


def test_the_installed_vllm():
    """Without a tree, that of this Python: here, the fork's wheel."""
    command = [sys.executable, "-m", "vllm_deepstack", "status", "--json"]
    done = subprocess.run(command, cwd=releases.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "present" not in json.loads(done.stdout)["defects"].values()


def test_no_vllm(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "missing" in capsys.readouterr().out
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
        assert f"warning: {taken}" in found.text()


def test_no_patch_no_warning(release_sources, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_FORCE_AOT_LOAD", "1")
    assert of_graphs(status(release_sources("0.33.0"), cache_dir=tmp_path)) == []
