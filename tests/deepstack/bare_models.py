"""vLLM's own DeepStack classes without weights: what the fork's contract is tested on.

`make(name)` gives a model as its `__init__` leaves it, but for what the staging of DeepStack's
features has no part in. Its decoder is one that says what it got.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from tests.conftest import has_module

LEVELS, ROWS, HIDDEN = 3, 8, 4
WIDTH = (1 + LEVELS) * HIDDEN
TEXT, IMAGE, VIDEO, AUDIO, PROMPT_EMBEDS = 3, 11, 12, 13, 15
OMNI = "qwen3_omni_moe_thinker"

MODELS = "vllm.model_executor.models"
CLASSES = {
    "qwen3_vl": (f"{MODELS}.qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": (f"{MODELS}.qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    OMNI: (f"{MODELS}.{OMNI}", "Qwen3OmniMoeThinkerForConditionalGeneration"),
    "cohere_compass": (f"{MODELS}.cohere_compass", "CohereCompassForConditionalGeneration"),
    "granite4_vision": (
        f"{MODELS}.granite4_vision",
        "Granite4VisionForConditionalGeneration",
    ),
    "moss_audio": (f"{MODELS}.moss_audio", "MossAudioModel"),
}
# Those that the imported vLLM has.
ALL = [name for name, (module, _) in CLASSES.items() if has_module(module)]
OWN = ("granite4_vision", "moss_audio")  # which stage under names, or by types, of their own
SHARED = [name for name in ALL if name not in OWN]


def load(name: str) -> Any:
    """Imported late: whoever only collects the tests is spared vLLM's import."""
    module, cls = CLASSES[name]
    if name == "granite4_vision":
        # It imports `llava`, and that what Transformers 5.10 has renamed; it uses none of it.
        pixtral = import_module("transformers.models.pixtral.modeling_pixtral")
        for renamed in ("PixtralRotaryEmbedding", "position_ids_in_meshgrid"):
            pixtral.__dict__.setdefault(renamed, torch.nn.Module)
    return getattr(import_module(module), cls)


def bare(cls: Any, **attributes: Any) -> Any:
    """Of a class, without what its `__init__` makes."""
    made = cls.__new__(cls)
    if isinstance(made, torch.nn.Module):
        torch.nn.Module.__init__(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Decoder(torch.nn.Module):
    """Adds the levels to its inputs, layer by layer; `during(levels)` runs while it does."""

    def __init__(self):
        super().__init__()
        self.embed_input_ids = torch.nn.Embedding(16, HIDDEN)
        self.config = SimpleNamespace(embedding_multiplier=1.0)
        self.during = lambda levels: None

    def forward(self, *args, inputs_embeds, deepstack_input_embeds, **kwargs):
        self.during(deepstack_input_embeds)
        if deepstack_input_embeds is not None:
            for level in deepstack_input_embeds.tensors.values():
                inputs_embeds = inputs_embeds + level[: len(inputs_embeds)]
        return inputs_embeds


class LanguageModel(torch.nn.Module):
    def __init__(self, decoder: Decoder):
        super().__init__()
        self.model = decoder
        self.embed_input_ids = decoder.embed_input_ids

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def make(name: str, rows: int = ROWS, **kind):
    model = bare(load(name), language_model=LanguageModel(Decoder()))
    model.config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=HIDDEN),
        vision_config=SimpleNamespace(deepstack_visual_indexes=list(range(LEVELS))),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    model.multimodal_config = SimpleNamespace(
        enable_mm_embeds=False, language_model_only=False, allow_missing_mm_embeddings=False
    )
    model.visual = SimpleNamespace(deepstack_visual_indexes=list(range(LEVELS)))
    model.use_deepstack, model.deepstack_num_level = True, LEVELS
    model.visual_dim, model.multiscale_dim = HIDDEN, LEVELS * HIDDEN
    model.language_model_only = False
    model.deepstack_audio_merger_list = [None] * LEVELS
    buffers = [torch.zeros(rows, HIDDEN, **kind) for _ in range(LEVELS)]
    if name == "granite4_vision":
        model._ds_layer_indices, model._ds_num_tokens = list(range(LEVELS)), 0
        model._ds_buffers = buffers
    elif name == "moss_audio":
        model.deepstack_input_embeds, model._deepstack_buffers = None, buffers
    else:
        model.deepstack_input_embeds = buffers
        model.deepstack_input_embeds_num_tokens = 0
    return model


def buffers_of(model) -> list[torch.Tensor]:
    """By level, in the fork and in the releases: MOSS-Audio's have none."""
    names = ("_deepstack_buffers", "_ds_buffers", "deepstack_input_embeds")
    return next(filter(None, (getattr(model, name, None) for name in names)), [])


def payload(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LEVELS, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def stack(tensors) -> torch.Tensor:
    """`[levels, tokens, hidden]` of what the decoder gets."""
    assert type(tensors).__name__ == "IntermediateTensors"
    assert [key[-1] for key in tensors.tensors] == [str(level) for level in range(LEVELS)]
    return torch.stack(list(tensors.tensors.values()))


def read(model, tokens: int) -> torch.Tensor:
    stacked = stack(model._get_deepstack_input_embeds(tokens))
    assert stacked.shape == (LEVELS, tokens, HIDDEN)
    return stacked


def run_forward(model, tokens: int, **kind) -> torch.Tensor:
    positions = torch.zeros(tokens, dtype=torch.long)
    return model.forward(
        input_ids=None, positions=positions, inputs_embeds=torch.ones(tokens, HIDDEN, **kind)
    )


def forward_reads(model, tokens: int, **kind) -> torch.Tensor:
    """What the decoder gets in a step of `tokens`, padding included; nothing counts as zeros."""
    seen = [torch.zeros(LEVELS, tokens, HIDDEN)]

    def during(levels):
        if levels is not None:
            seen.append(stack(levels)[:, :tokens].clone())

    model.language_model.model.during = during
    run_forward(model, tokens, **kind)
    return seen[-1]


def encoded(tokens: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def embed(model, tokens: list[int], embeddings: list[torch.Tensor]) -> torch.Tensor:
    """As the model runners call it: a list, and a mask on the CPU."""
    ids = torch.tensor(tokens, device=model.language_model.embed_input_ids.weight.device)
    is_multimodal = (ids != TEXT).cpu()
    with torch.inference_mode():
        return model.embed_input_ids(ids, list(embeddings), is_multimodal=is_multimodal)


def medium(name: str) -> int:
    """The token under which a model takes embeddings with levels."""
    return AUDIO if name == "moss_audio" else IMAGE


def embeddings_of(name: str, tokens: int, seed: int) -> torch.Tensor:
    """What the encoder gives for a medium: Granite's has no part for the decoder's input."""
    return encoded(tokens, seed, LEVELS * HIDDEN if name == "granite4_vision" else WIDTH)


def levels_of(embeddings: torch.Tensor) -> torch.Tensor:
    """`[levels, tokens, hidden]`."""
    return embeddings[:, -LEVELS * HIDDEN :].view(-1, LEVELS, HIDDEN).transpose(0, 1)
