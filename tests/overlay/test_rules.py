"""The rules by which the table of known files is made: release × defect, by each release's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

from tests.conftest import PR43617
from vllm_deepstack import releases
from vllm_deepstack.merged import table as files
from vllm_deepstack.package_index import CONFIG
from vllm_deepstack.patch.tree import Tree

from . import table
from .defects import DEFECTS, KINDS, MODELS, judged, worst

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


def within(version: str, first: str, last: str) -> bool:
    return Version(first) <= Version(version) <= Version(last)


@pytest.fixture(scope="module")
def found(release_sources):
    return table.judgements({version: release_sources(version) for version in RELEASES})


@pytest.mark.parametrize("version", RELEASES)
def test_before_and_after(found, version):
    before, after = found[version]
    gone_with_moss = {"D1"} if within(version, "0.23.0", "0.23.0") else set()
    gone_with_compass = {"D3"} if within(version, "0.28.0", "0.29.0") else set()
    expected = {name for name, span in PRESENT.items() if within(version, *span)}
    expected -= gone_with_moss | gone_with_compass
    assert {name for name, state in worst(before).items() if state == "present"} == expected
    for name, states in before.items():
        for defect, state in states.items():
            _, released = DEFECTS[defect].models[name]
            there = "latent" if DEFECTS[defect].latent else "present"
            assert (state == there) == released.contains(version), (name, defect)
    assert {name for name, state in worst(after).items() if state == "latent"} == {"D5"}
    left = {pair for pair, span in LEFT.items() if within(version, *span)}
    assert left == {
        (name, defect)
        for name, states in after.items()
        for defect, state in states.items()
        if state == "present"
    }
    gone = {
        (name, defect)
        for name, states in before.items()
        for defect, state in states.items()
        if state == "present" and (name, defect) not in left
    }
    sources = releases.known(version).sources
    known = [files().files[path][sha] for path, sha in sources.items()]
    fixes = {(model, n) for file in known for model, names in file.fixes.items() for n in names}
    leaves = {(model, n) for file in known for model, names in file.left.items() for n in names}
    # 0.33.0 has files of 0.32.0, and ended D20 elsewhere.
    said = {pair for pair in gone if version != "0.32.0" or pair[1] != "D20"}
    assert said <= fixes <= gone
    assert leaves == left


@pytest.mark.parametrize("version", RELEASES)
def test_by_model(found, version):
    """A class that a release lacks is not there."""
    before, _ = found[version]
    for name, since in SINCE.items():
        assert (name in before) == (Version(version) >= Version(since))
    for name in QWEN:
        for defect, span in OF_QWEN.items():
            there = before[name][defect] == "present"
            assert there == within(version, *span), (name, defect)
    assert before["Granite 4 Vision"]["D2"] == "present"


def test_docs_have_the_tables(found):
    """`python -m tests.overlay.table` prints them."""
    text = (releases.ROOT / "docs/defects.md").read_text()
    assert table.table(found) in text
    assert table.models_table(found) in text


def test_pull_request_43617_trades_defects(release_sources):
    root = release_sources("0.22.1")
    before = judged(root)["Qwen3-VL"]
    Tree(root, PR43617).apply()
    after = judged(root)["Qwen3-VL"]
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {"D1": "gone", "D2": "present", "D3": "present", "D4": "latent"}


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


def clear_another(root: Path, file: str) -> None:
    """First, too, but what is no buffer of levels."""
    edit(
        root,
        file,
        r"(    def embed_input_ids\(\n(?:.+\n)*?    \) -> torch.Tensor:\n)",
        r"\g<1>        for scratch in self.scratch:\n            scratch.zero_()\n",
    )


@pytest.mark.parametrize(
    "fix, state", [(clear_first, "gone"), (clear_always, "gone"), (clear_another, "present")]
)
@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3-Omni", "Cohere Compass"])
def test_the_smallest_fixes_of_d2_count(release_sources, fix, state, name):
    """The first two were run on a GPU, and leave no request wrong."""
    root = release_sources("0.33.0")
    assert judged(root)[name]["D2"] == "present"
    fix(root, KINDS[name].file)
    assert judged(root)[name]["D2"] == state
    assert judged(root)[name]["D7"] == "present"


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
    found = judged(root)["Qwen3-Omni"]
    assert found["D5"] == found["D4"] == "gone"


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
    expected = dict.fromkeys(fixed.split(), "gone") | dict.fromkeys(kept.split(), "present")
    states = judged(root)[model]
    assert {states[name] for name in expected} == {"present"}
    for each in edits:
        edit(root, *each)
    found = judged(root)[model]
    assert {name: found[name] for name in expected} == expected
