"""`embed_input_ids`, on vLLM's own model classes: every token's features land in its row."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import examples

from .bare_models import (
    ALL,
    AUDIO,
    HIDDEN,
    IMAGE,
    LEVELS,
    OMNI,
    PROMPT_EMBEDS,
    ROWS,
    SHARED,
    TEXT,
    VIDEO,
    WIDTH,
    bare,
    embed,
    embeddings_of,
    encoded,
    forward_reads,
    levels_of,
    make,
    medium,
    payload,
    read,
)

everywhere = pytest.mark.bites("stock", "pr43617", "newest")
STEP = [TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT]


def embeds_for(kind: int, tokens: int, seed: int) -> torch.Tensor:
    embeds = encoded(tokens, seed, WIDTH if kind in (IMAGE, VIDEO) else HIDDEN)
    embeds.modality = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}.get(kind, "prompt_embeds")
    return embeds


def expected(tokens: list[int], embeddings: list[torch.Tensor]) -> torch.Tensor:
    """`[levels, tokens, hidden]`, row by row."""
    levels = torch.zeros(LEVELS, len(tokens), HIDDEN)
    vision = [e for e in embeddings if e.size(-1) == WIDTH]
    features = iter(torch.cat(vision)) if vision else iter([])
    for row, token in enumerate(tokens):
        if token in (IMAGE, VIDEO):
            levels[:, row] = next(features)[HIDDEN:].view(LEVELS, HIDDEN)
    return levels


KINDS = [TEXT, IMAGE, VIDEO, AUDIO, PROMPT_EMBEDS]
batch = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, ROWS)), max_size=6)


@pytest.mark.thinned
@everywhere
@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(SHARED), st.lists(batch, min_size=1, max_size=4))
def test_features_land_in_their_rows_and_leave_with_their_step(name, batches):
    """Steps of text, images, video, audio and `prompt_embeds`, of any lengths and in any order;
    D2, D6, D14."""
    model = make(name, rows=6 * ROWS + 2)
    for number, batch in enumerate(batches):
        if name != OMNI:
            batch = [(VIDEO if kind == AUDIO else kind, length) for kind, length in batch]
        tokens = [kind for kind, length in batch for _ in range(length)] or [TEXT]
        embeddings = [
            embeds_for(kind, length, 100 * number + i)
            for i, (kind, length) in enumerate(batch)
            if kind != TEXT
        ]
        inputs = embed(model, tokens, embeddings)
        rows = [row for row, token in enumerate(tokens) if token != TEXT]
        if rows:
            assert inputs[rows].equal(torch.cat([e[:, :HIDDEN] for e in embeddings]))
        padded = read(model, len(tokens) + 2)
        assert padded[:, : len(tokens)].equal(expected(tokens, embeddings))
        assert padded[:, len(tokens) :].eq(0).all()


@pytest.mark.thinned
@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.sampled_from([VIDEO, AUDIO]), min_size=2, max_size=8), st.permutations(range(4)))
def test_audio_in_video(alternating, order):
    """Tokens of the two alternate; embeddings come one after the other. Other requests' media
    and `prompt_embeds` are in the step, before and after."""
    model = make(OMNI, rows=3 * ROWS)
    spans = {0: [IMAGE, IMAGE], 1: [PROMPT_EMBEDS], 2: [AUDIO], 3: alternating}
    tokens, embeddings = [TEXT], []
    for seed in order:
        tokens += [*spans[seed], TEXT]
        for kind in (IMAGE, VIDEO, AUDIO, PROMPT_EMBEDS):
            if count := spans[seed].count(kind):
                embeddings.append(embeds_for(kind, count, 10 * seed + kind))
    inputs = embed(model, tokens, embeddings)
    assert read(model, len(tokens)).equal(expected(tokens, embeddings))
    for kind in (IMAGE, VIDEO, AUDIO, PROMPT_EMBEDS):
        modality = embeds_for(kind, 1, 0).modality
        parts = [e[:, :HIDDEN] for e in embeddings if e.modality == modality]
        if parts:
            rows = [row for row, token in enumerate(tokens) if token == kind]
            assert inputs[rows].equal(torch.cat(parts))


@pytest.mark.bites("stock", "pr43617", "0.25.1")
@pytest.mark.parametrize("first", [True, False])
def test_audio_in_video_beside_an_image(first):
    """D21: upstream told them apart by their lengths, up to 0.25.1."""
    model, image, video = (
        make(OMNI, rows=12),
        [IMAGE, IMAGE],
        [VIDEO, AUDIO, VIDEO, VIDEO, AUDIO, VIDEO],
    )
    tokens = [TEXT, *image, TEXT, *video] if first else [TEXT, *video, TEXT, *image]
    embeddings = [embeds_for(VIDEO, 4, 1), embeds_for(AUDIO, 2, 2)]
    embeddings.insert(0 if first else 2, embeds_for(IMAGE, 2, 3))
    inputs = embed(model, tokens, embeddings)
    for embeds, kind in zip(embeddings, (IMAGE, VIDEO, AUDIO) if first else (VIDEO, AUDIO, IMAGE)):
        rows = [row for row, token in enumerate(tokens) if token == kind]
        assert inputs[rows].equal(embeds[:, :HIDDEN])
    assert read(model, len(tokens)).equal(expected(tokens, embeddings))


@pytest.mark.parametrize("tokens", [STEP, [TEXT, IMAGE, AUDIO], [VIDEO, AUDIO, VIDEO, AUDIO]])
def test_omni_with_an_encoder_without_levels(tokens):
    """Its media's embeddings are as wide as an audio's. As released."""
    model = make(OMNI)
    model.visual.deepstack_visual_indexes = model.config.vision_config.deepstack_visual_indexes = []
    model.deepstack_num_level, model.deepstack_input_embeds = 0, []
    model._deepstack_buffers = []
    kinds = [kind for kind in (IMAGE, VIDEO, AUDIO) if kind in tokens]
    embeddings = [encoded(tokens.count(kind), kind, HIDDEN) for kind in kinds]
    for kind, embeds in zip(kinds, embeddings):
        embeds.modality = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}[kind]
    inputs = embed(model, tokens, embeddings)
    for kind, embeds in zip(kinds, embeddings):
        rows = [row for row, token in enumerate(tokens) if token == kind]
        assert inputs[rows].equal(embeds)
    assert model._get_deepstack_input_embeds(len(tokens)) is None


@pytest.mark.parametrize("name", ["qwen3_vl", OMNI])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset, extra", [(0, 0), (1, 5)])
def test_embeddings_of_any_strides_and_dtype(name, dtype, offset, extra):
    """Efficient Video Sampling hands over slices of wider tensors."""
    model = make(name, dtype=dtype)
    model.language_model.to(dtype)
    wide = encoded(3, 1, offset + WIDTH + extra).to(dtype)
    embeddings = wide[:, offset : offset + WIDTH]
    embed(model, STEP, [embeddings[:2], embeddings[2:]])
    assert read(model, 6).equal(expected(STEP, [embeddings.float()]).to(dtype))


@everywhere
@pytest.mark.parametrize("name", SHARED)
def test_payload_that_replaces_another_of_other_rows(name):
    model = make(name)
    model._set_deepstack_input_embeds(payload(ROWS))
    embed(model, STEP, [encoded(2, 1), encoded(1, 2)])
    assert read(model, ROWS)[:, :6].equal(expected(STEP, [encoded(2, 1), encoded(1, 2)]))
    assert read(model, ROWS)[:, 6:].eq(0).all()


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("counts", [(2,), (2, 2)])
def test_embeddings_that_do_not_fit_the_placeholders_are_an_error(name, counts):
    model = make(name)
    embeddings = [encoded(count, seed) for seed, count in enumerate(counts)]
    with pytest.raises(ValueError, match=r"3 placeholders"):
        embed(model, STEP, embeddings)


@pytest.mark.parametrize("name", ALL)
def test_levels_of_every_model_land_in_their_rows(name, one_process):
    model, token = make(name), medium(name)
    embeddings = [embeddings_of(name, 2, 1), embeddings_of(name, 1, 2)]
    embed(model, [TEXT, token, token, TEXT, token], embeddings)
    seen = forward_reads(model, 7)
    assert seen[:, [1, 2, 4]].equal(torch.cat([levels_of(e) for e in embeddings], dim=1))
    assert seen[:, [0, 3, 5, 6]].eq(0).all()


class TestRequestsOwnEmbeddings:
    """D15: refused where it is one request's error, in the processor."""

    @pytest.fixture(params=[n for n in ("qwen3_vl", OMNI, "cohere_compass") if n in ALL])
    def processor(self, request):
        name = {
            "qwen3_vl": "Qwen3VLMultiModalProcessor",
            OMNI: "Qwen3OmniMoeThinkerMultiModalProcessor",
            "cohere_compass": "CohereCompassMultiModalProcessor",
        }[request.param]
        module = import_module(f"vllm.model_executor.models.{request.param}")
        vision = SimpleNamespace(
            spatial_merge_size=2, out_hidden_size=HIDDEN, deepstack_visual_indexes=[0, 1, 2]
        )
        info = SimpleNamespace(get_hf_config=lambda: SimpleNamespace(vision_config=vision))
        return bare(getattr(module, name), info=info)

    GRID = torch.tensor([[1, 2, 4], [1, 2, 2]])

    def fields(self, processor, embeds):
        inputs = {"image_embeds": embeds, "image_grid_thw": self.GRID}
        return processor._get_mm_fields_config(inputs, {})

    @pytest.mark.parametrize("listed", [False, True])
    def test_with_levels(self, processor, listed):
        embeds = [encoded(2, 1), encoded(1, 2)]
        assert "image_embeds" in self.fields(processor, embeds if listed else torch.cat(embeds))

    @everywhere
    @pytest.mark.parametrize("width", [HIDDEN, WIDTH - HIDDEN, WIDTH + 1])
    def test_of_another_width(self, processor, width):
        for embeds in (encoded(3, 1, width), [encoded(2, 1), encoded(1, 1, width)]):
            with pytest.raises(ValueError, match=rf"{width} wide; the model takes {WIDTH}"):
                self.fields(processor, embeds)

    def test_none(self, processor):
        assert processor._get_mm_fields_config({"image_grid_thw": self.GRID}, {})
