"""What inherits something from the overlay does as in the release, or the difference is a fix.

The heirs are found in vLLM's whole registry, by what their classes inherit. `-rP` prints them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from packaging.specifiers import SpecifierSet

from tests.deepstack.test_releases import PRELOAD, patched

from . import look

RELEASES = ["0.22.1", "0.27.1", "0.30.0", "0.32.0", "0.33.0"]
# Has D2 in methods of its own, and no released checkpoint that has levels.
QWEN4_EXP = "Qwen4ExpForConditionalGeneration"
HEIRS = {
    "Alpamayo2Super": ">=0.33",
    "ClefFlashForJointSchema": ">=0.33",
    "ClefOmniForJointSchema": ">=0.32",
    "CohereCompassForConditionalGeneration": ">=0.30",
    "ColQwen3": "",
    "ColQwen3_5": "",
    "Cosmos3EdgeForConditionalGeneration": ">=0.27",
    "Cosmos3ForConditionalGeneration": ">=0.27",
    "D3ForSequenceClassification": ">=0.33",
    "Ernie4_5_VLMoeForConditionalGeneration": "",
    "Granite4VisionForConditionalGeneration": "",
    "InternS1ProForConditionalGeneration": "",
    "InternS2MobiusForConditionalGeneration": ">=0.30",
    "InternS2PreviewForConditionalGeneration": "",
    "MossAudioModel": ">=0.24",
    "OpsColQwen3Model": "",
    "Qwen3ASRForConditionalGeneration": "<0.32",
    "Qwen3ASRForcedAlignerForTokenClassification": "<0.32",
    "Qwen3ASRRealtimeGeneration": "<0.32",
    "Qwen3OmniMoeForConditionalGeneration": "",
    "Qwen3VLForConditionalGeneration": "",
    "Qwen3VLMoeForConditionalGeneration": "",
    "Qwen3VLNemotronEmbedModel": "",
    "Qwen3_5ForConditionalGeneration": "",
    "Qwen3_5MoeForConditionalGeneration": "",
    QWEN4_EXP: ">=0.30",
}
# What cannot be tried: heirs, and what the overlay changes and no heir in the registry has.
UNTRIED = {
    # As released it does not start: its `__init__` reads `model_config`, which it does not set.
    "InternS1ProForConditionalGeneration": "==0.32.0",
    # A part of a model (D8), in tests/deepstack.
    "vllm.model_executor.models.qwen3_omni_moe_thinker.Qwen3Omni_VisionTransformer": "<0.24",
    # On engines (D16, D17, D19).
    "vllm.model_executor.models.ernie45_vl_moe.Ernie4_5_VLMoeMoE": "",
    "vllm.model_executor.models.granite4_vision.Granite4VisionLLMForCausalLM": "",
    "vllm.model_executor.models.transformers.multimodal.MultiModalMixin": "",
}
# Differences: the trial, as released, with the fork. Why, and the kind of encoder with which the
# fork does the same, if there is such.
META, NO_LEVELS = "ValueError: a decoder's input is on the meta device", "image without levels"
NAMED = {
    rf".*: {look.REPLAYED}: ok → ok": ("D2", None),
    rf".*: (text|audio|prompt_embeds|{NO_LEVELS}): {META} → ok": ("D3", "levels"),
    rf".*: (prompt_embeds|{NO_LEVELS}): IndexError: tuple index out of range → ok": ("D18", None),
    r".*: prompt_embeds and image: ValueError: MOSS-Audio.* → ok": ("D18", None),
    r".*: prompt_embeds: ok → ok": ("D17", None),  # a mask of no token is none
    rf".*: (prompt_embeds|{NO_LEVELS}): RuntimeError: split_with_sizes.* → ok": (
        "D14",
        "no levels",
    ),
    r".*: prompt_embeds and image: RuntimeError: Sizes of tensors must.* → ok": ("D14", None),
    r".*, embeddings alone: .*: .* → ok": ("D15", "levels"),
    r".*, levels: (image|video)_embeds, narrow.*: ok → ValueError: .* are 4 wide; .*": (
        "D15",
        None,
    ),
    r".*, levels: image and audio in video: ValueError: Attempted to assign.* → ok": ("D21", None),
    # vllm-project/vllm#53700, 0.26.0 to 0.31.0: embeddings that are split lose their modality.
    r".*, levels: .*audio in video: ValueError: Missing modality.* → ok": ("#53700", None),
}


@pytest.fixture(scope="module", params=RELEASES)
def release(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def looked(release, unpacked, tmp_path_factory) -> list[dict[str, Any]]:
    """Once for all of pytest-xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    answer = root / f"heirs-{release}.json"
    with FileLock(f"{answer}.lock"):
        if not answer.exists():
            folder = tmp_path_factory.mktemp(release)
            answer.write_text(json.dumps(both(unpacked(release), folder)))
    return json.loads(answer.read_text())


def both(released: Path, folder: Path, *overlay: Path) -> list[dict[str, Any]]:
    """What heirs the fork has and what they do, there and in the release."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    fork = patched(released, folder, *overlay)
    classes, functions = look.changed(released, fork)
    assert not functions  # else whoever calls them is an heir, too, and has to be found
    found: list[dict[str, Any]] = []
    for tree in (fork, released):
        wanted = [*found[0]["heirs"]] if found else None
        log, answer = folder / "log", folder / "answer.json"
        process = context.Process(target=look.write, args=(tree, classes, wanted, log, answer))
        process.start()
        process.join()
        assert process.exitcode == 0, log.read_text()
        found.append(json.loads(answer.read_text()))
    return found


def in_release(table: dict[str, str], release: str) -> set[str]:
    return {name for name, text in table.items() if SpecifierSet(text).contains(release)}


def end(result: Any) -> str:
    """A trial's error, or that it has none."""
    last = result[-1] if isinstance(result, list) else result
    return last.split("\n")[0] if isinstance(last, str) else "ok"


def test_heirs_are_found_and_tried(release, looked):
    fork, released = looked
    assert set(fork["heirs"]) == set(released["heirs"]) == in_release(HEIRS, release)
    untried = {*fork["untried"], *fork["unused"]}
    for heir, found in fork["heirs"].items():
        good = [name for name, result in found["trials"].items() if end(result) == "ok"]
        for role in found["inherits"]:
            media = [name for name in good if re.match(f"{role}, .*: .*(image|audio)", name)]
            untried |= set() if media else {heir}
    assert untried == in_release(UNTRIED, release)


def test_heirs_do_the_same_or_the_difference_has_a_name(release, looked):
    fork, released = (one["heirs"] for one in looked)
    unnamed, used = [], set()
    for heir, found in fork.items():
        now, before, why = found["trials"], released[heir]["trials"], Counter()
        assert now.keys() == before.keys()
        for trial in [trial for trial in now if now[trial] != before[trial]]:
            difference = f"{trial}: {end(before[trial])} → {end(now[trial])}"
            name = next((name for name in NAMED if re.fullmatch(name, difference)), None)
            if name is None:
                unnamed.append(f"{heir}, {difference}\n{before[trial]}\n{now[trial]}")
                continue
            reason, twin = NAMED[name]
            if twin:
                assert now[trial] == now[re.sub(", .*?:", f", {twin}:", trial, count=1)], difference
            used.add(name)
            why[reason] += 1
        for trial in now if heir != QWEN4_EXP else ():  # no step has what an earlier one left
            if trial.endswith(look.REPLAYED) and end(now[trial]) == "ok":
                assert now[trial][-1] == now[trial.replace(look.REPLAYED, "text")][0], (heir, trial)
        of = ", ".join(names[0].rpartition(".")[2] for names in found["inherits"].values())
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sorted(why.items()))
        print(f"{release} {heir} ({of}): {len(now)} trials, different: {reasons or 'none'}")
    assert not unnamed, "\n".join(unnamed)
    if release == RELEASES[-1]:
        assert used == {name for name in NAMED if NAMED[name][0] not in ("D21", "#53700")}
