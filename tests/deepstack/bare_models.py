"""vLLM's own model classes with buffers and without weights: what the contract is tested on."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

LEVELS, ROWS, HIDDEN = 3, 8, 4
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class Config:
    """The one part of a model's config that the stock release's methods look at."""

    class text_config:
        hidden_size = HIDDEN


class Decoder:
    """Stands for the decoder: `during(step)` runs while it does, given what it got."""

    def __init__(self):
        self.embed_input_ids = torch.nn.Embedding(16, HIDDEN)
        self.during = lambda step: None

    def model(self, *args, inputs_embeds, deepstack_input_embeds, **kwargs):
        self.during(deepstack_input_embeds)
        return inputs_embeds


def load(module: str) -> type:
    """Imported late: whoever only collects the tests is spared vLLM's import."""
    return getattr(import_module(f"vllm.model_executor.models.{module}"), CLASSES[module])


def make(cls, rows=ROWS, **kind):
    """A model as its `__init__` leaves it, but for what the buffers have no part in."""
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    model.config = Config
    model.deepstack_num_level = LEVELS
    model.deepstack_input_embeds = [torch.zeros(rows, HIDDEN, **kind) for _ in range(LEVELS)]
    model.deepstack_input_embeds_num_tokens = 0
    decoder = Decoder()
    model.language_model = SimpleNamespace(
        model=decoder.model, embed_input_ids=decoder.embed_input_ids, decoder=decoder
    )
    return model


def payload(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LEVELS, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stack(tensors) -> torch.Tensor:
    """`[levels, tokens, hidden]` of what the decoder gets."""
    assert type(tensors).__name__ == "IntermediateTensors"
    assert list(tensors.tensors) == [f"deepstack_input_embeds_{level}" for level in range(LEVELS)]
    return torch.stack(list(tensors.tensors.values()))


def read(model, tokens: int) -> torch.Tensor:
    stacked = stack(model._get_deepstack_input_embeds(tokens))
    assert stacked.shape == (LEVELS, tokens, HIDDEN)
    return stacked


def run_forward(model, tokens: int, **kind) -> None:
    positions = torch.zeros(3, tokens, dtype=torch.long)
    model.forward(
        input_ids=None, positions=positions, inputs_embeds=torch.ones(tokens, HIDDEN, **kind)
    )
