from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.models.cohere_compass import (
    CohereCompassForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

pytestmark = pytest.mark.core_model


@pytest.mark.parametrize(
    "model_class",
    [
        CohereCompassForConditionalGeneration,
        Qwen3OmniMoeThinkerForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
    ],
)
def test_deepstack_buffers(model_class):
    """Features are read as staged until cleared; a longer step gets longer buffers."""
    model = object.__new__(model_class)
    assert model._get_deepstack_input_embeds(4) is None  # without a vision tower

    model.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=8))
    model.deepstack_num_level = 2
    model.deepstack_input_embeds = [torch.zeros(4, 8), torch.zeros(4, 8)]
    model.deepstack_input_embeds_num_tokens = 0
    for num_tokens in (3, 6):
        features = torch.rand(2, num_tokens, 8) + 1
        model._set_deepstack_input_embeds(features)
        staged = model._get_deepstack_input_embeds(num_tokens)
        assert list(staged.tensors) == [f"deepstack_input_embeds_{i}" for i in (0, 1)]
        assert torch.equal(torch.stack(list(staged.tensors.values())), features)
        assert model.deepstack_input_embeds_num_tokens == num_tokens

        model._clear_deepstack_input_embeds(num_tokens)
        assert not any(tensor.any() for tensor in staged.tensors.values())
        assert model.deepstack_input_embeds_num_tokens == 0
