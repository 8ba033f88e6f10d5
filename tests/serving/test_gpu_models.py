"""The other models that stage features beside the decoder's inputs, each on real engines:
compiled against eager, then text after images."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import has_module
from tests.fleet import DTYPE, Case, version
from tools.parity.compare import TOLERANCE, tolerance

from .modes import BREAKABLE, DEFAULT
from .soak import DifferenceError, Soak
from .streams import Picture, Request, Text
from .test_gpu_leaks import images_then_texts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600, func_only=True)]

UNBUILT = {
    "qwen4_exp": "no tiny checkpoint: its n-gram tables, hyper-connections and sparse attention "
    "have kernels of the released model's widths, and Transformers' class has no levels",
    "moss_audio": "no tiny checkpoint: Transformers has no configuration of it",
}
IMAGES = [
    Request((Text(12), Picture(192, 160), Text(5)), max_tokens=8),
    Request((Picture(100, 80, 1), Text(9, 1), Picture(200, 220, 2), Text(3)), max_tokens=8),
    Request((Text(12, 3),), max_tokens=8, joins_after=99),
]


def has_model(name: str) -> bool:
    """Whether the release has it, in a form that starts beside today's Transformers."""
    if name == "granite4_vision" and SpecifierSet("<0.30").contains(version()):
        return False
    return has_module(f"vllm.model_executor.models.{name}")


def on(models: dict[str, tuple[str, ...]]):
    """In the default mode and with breakable graphs; of each model, the vLLMs it fails on."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(Case(model, mode), id=f"{model}-{mode.name}", marks=pytest.mark.bites(*on))
            for model, on in models.items()
            if has_model(model)
            for mode in (DEFAULT, BREAKABLE)
        ],
    )


def check(fleet, case, stream, figures, what: str) -> None:
    soak = Soak(fleet.engine(case), fleet.oracle(case), TOLERANCE[DTYPE])
    found = soak.differences(stream)
    limit = tolerance(DTYPE, soak.alone.values())
    wrong = sum(difference.largest > limit for difference in found)
    figures(
        what=what,
        model=case.model,
        mode=case.mode.name,
        requests=len(found),
        wrong=wrong,
        largest=soak.largest,
        tolerance=limit,
    )
    if wrong:
        raise DifferenceError(f"{wrong} requests differ, by up to {soak.largest:.2g}")


@on({"qwen3_vl_moe": (), "cohere_compass": (), "granite4_vision": ()})
def test_images_count(case, fleet, figures):
    check(fleet, case, IMAGES, figures, "images, compiled")


@on({"qwen3_vl_moe": ("newest",), "cohere_compass": ("newest",), "granite4_vision": ("newest",)})
def test_text_after_images(case, fleet, figures):
    """D2."""
    check(fleet, case, images_then_texts(), figures, "images then texts")


@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt(name):
    pytest.skip(UNBUILT[name])
