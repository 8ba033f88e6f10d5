"""The soak's own part: what it counts, shrinks and says. Its engines are made up here."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_deepstack.check.compare import Run
from vllm_deepstack.check.processes import EngineError

from .soak import DifferenceError, Soak
from .streams import Audio, Picture, Request, Text


class MadeUp:
    """Gives zeros, and ones where `wrong(stream, request)`."""

    def __init__(self, wrong=lambda stream, request: False):
        self.wrong = wrong

    def budget(self):
        return 64

    def serve(self, stream, threshold=0):
        return [
            Run(
                np.zeros(request.max_tokens, np.int64),
                np.full((request.max_tokens, 8), float(self.wrong(stream, request)), np.float32),
            )
            for request in stream
        ]


def pictures(request):
    return sum(isinstance(part, Picture) for part in request.parts)


def test_agreement():
    soak = Soak(MadeUp(), MadeUp(), 0.25)
    soak.run(("image", "video"), 50, seed=0)
    assert 50 <= soak.requests < 70
    assert soak.steps == soak.compared > 50
    assert soak.largest == 0 and soak.first_failure is None


def test_difference_is_shrunk_and_said():
    """An engine that is wrong where a request with two pictures is served beside another."""

    def wrong(stream, request):
        return len(stream) > 1 and pictures(request) > 1

    soak = Soak(MadeUp(wrong), MadeUp(), 0.25)
    with pytest.raises(DifferenceError, match=r"of [2-4]: .* 1 at the first token") as found:
        soak.run(("image", "video", "audio"), 500, seed=0)
    notes = "\n".join(found.value.__notes__)
    # How short depends on Hypothesis, which draws numbers from all modules that are imported.
    assert 2 <= notes.count("Request(") <= 4 and 2 <= notes.count("Picture(") <= 8
    assert f"--seed 0, after {soak.first_failure} requests" in notes


def test_difference_that_does_not_recur():
    served = []

    def wrong(stream, request):
        served.append(request)
        return len(served) == 7

    with pytest.raises(DifferenceError, match=r"did not recur: \[Request\((.|\n)*after 7 requests"):
        Soak(MadeUp(wrong), MadeUp(), 0.25).run(("image", "video"), 100, seed=0)


def test_dead_engine_is_no_difference():
    class Dead(MadeUp):
        def serve(self, stream, threshold=0):
            raise EngineError("served died")

    with pytest.raises(EngineError, match="served died") as death:
        Soak(Dead(), MadeUp(), 0.25).run(("image", "video"), 100, seed=3)
    assert "--seed 3: [Request(" in death.value.__notes__[0]


def test_prompt_of_a_request(models):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models["qwen3_omni"])
    parts = (Text(3), Audio(200), Picture(64, 64, 1))
    open_, closed = (Request(parts, closed=closed).prompt(tokenizer) for closed in (False, True))
    ids = closed["prompt_token_ids"]
    assert open_["prompt_token_ids"] == ids[:-1]
    assert tokenizer.convert_ids_to_tokens(ids[3:]) == [
        *("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
        *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    ]
    assert Request(parts).prompt(tokenizer)["multi_modal_uuids"] == closed["multi_modal_uuids"]
    assert closed["multi_modal_data"]["image"][0].size == (64, 64)
