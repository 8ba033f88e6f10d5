# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""DeepStack features reach the decoder in the step they belong to, and in no other.

On the model classes without weights, so without a GPU: what `forward` leaves undone
here is what a replayed full CUDA graph leaves undone there.
"""

from types import SimpleNamespace

import pytest
import torch

from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.utils.network_utils import (
    get_distributed_init_method,
    get_loopback_ip,
    get_open_port,
)

pytestmark = [pytest.mark.core_model, pytest.mark.cpu_test]

LEVELS, ROWS, HIDDEN = 3, 8, 4
TEXT, IMAGE = 3, 11
STEP = [TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT]
IMAGE_ROWS = [1, 2, 4]


class Decoder(torch.nn.Module):
    """Embeds tokens, and keeps what a step adds to its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_input_ids = torch.nn.Embedding(16, HIDDEN)
        self.steps: list[torch.Tensor] = []

    def model(self, *args, inputs_embeds, deepstack_input_embeds, **kwargs):
        self.steps.append(torch.stack(list(deepstack_input_embeds.tensors.values())))
        return inputs_embeds


@pytest.fixture(
    params=[
        Qwen3VLForConditionalGeneration,
        Qwen3OmniMoeThinkerForConditionalGeneration,
    ]
)
def model(request):
    """A model as its `__init__` leaves it, in what DeepStack has a part in."""
    model = request.param.__new__(request.param)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=HIDDEN),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        audio_token_id=IMAGE + 2,
    )
    model.use_deepstack = True
    model.deepstack_num_level = LEVELS
    model.visual_dim, model.multiscale_dim = HIDDEN, LEVELS * HIDDEN
    model.visual = SimpleNamespace(deepstack_visual_indexes=list(range(LEVELS)))
    model.deepstack_input_embeds = [torch.zeros(ROWS, HIDDEN) for _ in range(LEVELS)]
    model.deepstack_input_embeds_num_tokens = 0
    model.language_model = Decoder()
    model.get_language_model = lambda: model.language_model
    return model


def payload(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LEVELS, tokens, HIDDEN, generator=generator)


def read(model, tokens: int) -> torch.Tensor:
    read = model._get_deepstack_input_embeds(tokens)
    assert read is not None
    return torch.stack(list(read.tensors.values()))


def embed(model, tokens: list[int], *images: torch.Tensor) -> None:
    ids = torch.tensor(tokens)
    with torch.inference_mode():
        model.embed_input_ids(ids, list(images), is_multimodal=ids == IMAGE)


def encoded(tokens: int) -> torch.Tensor:
    """What the vision encoder gives for an image: its embeddings, then the levels."""
    levels = payload(tokens).transpose(0, 1).reshape(tokens, LEVELS * HIDDEN)
    return torch.cat([torch.ones(tokens, HIDDEN), levels], dim=1)


def test_inputs_are_the_same_with_and_without_features(model):
    """Or the graph that is compiled in the profiling run never takes any."""
    before = model._get_deepstack_input_embeds(5)
    model._set_deepstack_input_embeds(payload(5))
    after = model._get_deepstack_input_embeds(5)
    assert before is not None
    assert {key: t.data_ptr() for key, t in before.tensors.items()} == {
        key: t.data_ptr() for key, t in after.tensors.items()
    }


def test_features_land_in_the_rows_of_their_tokens(model):
    embed(model, STEP, encoded(2), encoded(1))
    staged = read(model, ROWS)
    assert staged[:, [1, 2]].equal(payload(2))
    assert staged[:, [4]].equal(payload(1))
    assert staged[:, [0, 3, 5, 6, 7]].eq(0).all()


def test_features_end_with_their_step(model):
    """Also where a full CUDA graph replays, and `forward` does not run to clear them:
    an image token that is scheduled alone makes a uniform decode batch."""
    embed(model, [IMAGE], encoded(1))
    assert read(model, 1).equal(payload(1))
    model.embed_input_ids(torch.tensor([TEXT]))
    assert read(model, ROWS).eq(0).all()


@pytest.fixture
def one_stage(default_vllm_config):
    """The parallel groups of this process alone: `forward` asks for its stage."""
    method = get_distributed_init_method(get_loopback_ip(), get_open_port())
    init_distributed_environment(1, 0, method, 0, backend="gloo")
    initialize_model_parallel(1, 1, backend="gloo")
    yield
    cleanup_dist_env_and_memory()


def test_forward_gives_the_decoder_the_features_of_the_step(model, one_stage):
    embed(model, STEP, encoded(3))
    for _ in range(2):
        model.forward(
            input_ids=None,
            positions=torch.zeros(3, len(STEP), dtype=torch.long),
            inputs_embeds=torch.ones(len(STEP), HIDDEN),
        )
    with_features, without = model.language_model.steps
    assert with_features[:, IMAGE_ROWS].equal(payload(3))
    assert without.eq(0).all()


def test_padding_beyond_the_buffers_keeps_the_features(model):
    model._set_deepstack_input_embeds(payload(5))
    padded = read(model, ROWS + 3)
    assert padded[:, :5].equal(payload(5))
    assert padded[:, 5:].eq(0).all()


def test_shorter_payload_leaves_nothing_of_a_longer_one(model):
    model._set_deepstack_input_embeds(payload(6, seed=1))
    model._set_deepstack_input_embeds(payload(2, seed=2))
    assert read(model, ROWS)[:, :2].equal(payload(2, seed=2))
    assert read(model, ROWS)[:, 2:].eq(0).all()
