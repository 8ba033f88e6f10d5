"""`embed_input_ids`, on vLLM's own model classes: every image token's features land in its row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .bare_models import CLASSES, HIDDEN, LEVELS, ROWS, load, make, payload, read

everywhere = pytest.mark.bites("stock", "pr43617")
TEXT, IMAGE, VIDEO, AUDIO = 3, 11, 12, 13
WIDTH = (1 + LEVELS) * HIDDEN


def embedder(module: str, **kind):
    """A bare model that embeds multimodal tokens."""
    model = make(load(module), **kind)
    model.config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=HIDDEN),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    model.use_deepstack = True
    model.visual_dim, model.multiscale_dim = HIDDEN, LEVELS * HIDDEN
    model.visual = SimpleNamespace(deepstack_visual_indexes=list(range(LEVELS)))
    model.language_model.embed_input_ids = torch.nn.Embedding(16, HIDDEN, **kind)
    model.get_language_model = lambda: model.language_model
    return model


def encoded(tokens: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def embed(model, tokens: list[int], embeddings: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.tensor(tokens)
    is_multimodal = (ids != TEXT).cpu()
    with torch.inference_mode():
        return model.embed_input_ids(ids, list(embeddings), is_multimodal=is_multimodal)


def expected(tokens: list[int], embeddings: list[torch.Tensor]) -> torch.Tensor:
    """`[levels, tokens, hidden]`, row by row."""
    levels = torch.zeros(LEVELS, len(tokens), HIDDEN)
    vision = [e for e in embeddings if e.size(-1) == WIDTH]
    features = iter(torch.cat(vision)) if vision else iter([])
    for row, token in enumerate(tokens):
        if token in (IMAGE, VIDEO):
            levels[:, row] = next(features)[HIDDEN:].view(LEVELS, HIDDEN)
    return levels


def step(other: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.sampled_from([TEXT, IMAGE, other]), st.integers(1, ROWS)))


# Not both of them: some releases take audio beside a video for the video's own.
steps = st.lists(st.one_of(step(VIDEO), step(AUDIO)), min_size=1, max_size=4)


@everywhere
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(CLASSES)), steps)
def test_features_land_in_their_rows_and_leave_with_their_step(module, batches):
    """Steps of text, images, video and audio, of any lengths; D2, D4 to D6."""
    model = embedder(module)
    for number, batch in enumerate(batches):
        if module == "qwen3_vl":
            batch = [(VIDEO if kind == AUDIO else kind, length) for kind, length in batch]
        tokens = [kind for kind, length in batch for _ in range(length)] or [TEXT]
        embeddings = [
            encoded(length, 100 * number + i, HIDDEN if kind == AUDIO else WIDTH)
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


@pytest.fixture(params=CLASSES)
def module(request):
    return request.param


STEP = [TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT]


def test_audio_in_video():
    """Tokens of the two alternate; embeddings come one after the other."""
    model = embedder("qwen3_omni_moe_thinker")
    tokens = [VIDEO, VIDEO, AUDIO, VIDEO, AUDIO, TEXT]
    video, audio = encoded(3, 1), encoded(2, 2, HIDDEN)
    video.modality, audio.modality = "video", "audio"  # which vLLM 0.32 and later ask for
    embed(model, tokens, [video, audio])
    assert read(model, 8)[:, :6].equal(expected(tokens, [video, audio]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset, extra", [(0, 0), (1, 5)])
def test_embeddings_of_any_strides_and_dtype(module, dtype, offset, extra):
    """Efficient Video Sampling hands over slices of wider tensors."""
    model = embedder(module, dtype=dtype)
    wide = encoded(3, 1, offset + WIDTH + extra).to(dtype)
    embeddings = wide[:, offset : offset + WIDTH]
    embed(model, STEP, [embeddings[:2], embeddings[2:]])
    assert read(model, 6).equal(expected(STEP, [embeddings.float()]).to(dtype))


@everywhere
def test_payload_that_replaces_another_of_other_rows(module):
    model = embedder(module)
    model._set_deepstack_input_embeds(payload(ROWS))
    embed(model, STEP, [encoded(2, 1), encoded(1, 2)])
    assert read(model, ROWS)[:, :6].equal(expected(STEP, [encoded(2, 1), encoded(1, 2)]))
    assert read(model, ROWS)[:, 6:].eq(0).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(CLASSES)), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_slices_of_one_tensor(module, slices):
    """Images that were encoded together, and chunks of them: neighbors in memory, or not."""
    model = embedder(module)
    together = encoded(6, 1)
    embeddings = [together[min(s) : max(s)] for s in slices]
    tokens = [IMAGE for embeds in embeddings for _ in embeds] + [TEXT]
    embed(model, tokens, embeddings)
    assert read(model, len(tokens)).equal(expected(tokens, embeddings))


@pytest.mark.parametrize("counts", [(2,), (2, 2)])
def test_embeddings_that_do_not_fit_the_placeholders_are_an_error(module, counts):
    model = embedder(module)
    embeddings = [encoded(count, seed) for seed, count in enumerate(counts)]
    with pytest.raises(ValueError, match=r"3 placeholders"):
        embed(model, STEP, embeddings)


def test_embeddings_without_levels_are_not_taken_for_staged_ones():
    """Qwen3-VL's own error, whatever an earlier step has staged."""
    model = embedder("qwen3_vl")
    embed(model, STEP, [encoded(3, 1)])
    with pytest.raises((RuntimeError, ValueError)):
        embed(model, STEP, [encoded(3, 1, HIDDEN)])


def test_levels_are_dropped_where_there_are_no_buffers():
    """InternS1-Pro: inherits Qwen3-VL's class, and makes none."""
    model = embedder("qwen3_vl")
    del model.deepstack_input_embeds
    inputs = embed(model, STEP, [encoded(3, 1)])
    assert inputs[[1, 2, 4]].equal(encoded(3, 1)[:, :HIDDEN])
    assert model._get_deepstack_input_embeds(6) is None
