"""Qwen3-Omni's M-RoPE positions, on vLLM's own class: right, and for every prompt (D12)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import examples

from .bare_models import AUDIO, IMAGE, OMNI, TEXT, VIDEO, bare, load

bites = pytest.mark.bites
VISION_START, VISION_END, AUDIO_START, AUDIO_END = 4, 5, 6, 7
MERGE, PER_SECOND, SECONDS = 2, 13, 2.0


def thinker():
    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=MERGE),
        position_id_per_seconds=PER_SECOND,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )
    return bare(load(OMNI), config=config)


class Medium:
    """One in a prompt: its tokens there, and the grid that they have, `[3, tokens]`."""

    def __init__(self, kind: str, size: tuple[int, ...]):
        self.kind, self.size = kind, size
        if kind == "audio":
            (self.frames,) = size  # 100 of them are 13 tokens
            length = audio_tokens(self.frames)
            self.tokens, self.grid = [AUDIO] * length, torch.arange(length).expand(3, -1)
            return
        t, h, w = size
        factor = PER_SECOND * (SECONDS if kind == "video" else 1)
        grid = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        self.grid = torch.stack([(grid[0] * factor).long(), grid[1], grid[2]]).flatten(1)
        self.tokens = [IMAGE if kind == "image" else VIDEO] * (t * h * w)

    def feature(self, offset: int) -> SimpleNamespace:
        data = {"audio_feature_lengths": torch.tensor(self.frames)} if self.kind == "audio" else {}
        if self.kind != "audio":
            t, h, w = self.size
            data[f"{self.kind}_grid_thw"] = torch.tensor([t, h * MERGE, w * MERGE])
        if self.kind == "video":
            data["second_per_grid_ts"] = torch.tensor(SECONDS)
        fields = {key: SimpleNamespace(data=value) for key, value in data.items()}
        position = SimpleNamespace(offset=offset, length=len(self.tokens))
        return SimpleNamespace(modality=self.kind, mm_position=position, data=fields)


def audio_tokens(frames: int) -> int:
    """13 for 100 frames, and for the rest what three convolutions of stride 2 leave."""
    rest = frames % 100
    for _ in range(3):
        rest = (rest + 1) // 2
    return frames // 100 * 13 + rest


def positions(prompt: list[int | Medium]) -> tuple[list[int], torch.Tensor, int]:
    tokens: list[int] = []
    features = []
    for part in prompt:
        if isinstance(part, Medium):
            features.append(part.feature(len(tokens)))
            tokens += part.tokens
        else:
            tokens.append(part)
    found, delta = thinker().get_mrope_input_positions(tokens, features)
    return tokens, found, delta


def expected(prompt: list[int | Medium]) -> torch.Tensor:
    """Token by token: text is one further than all before it, a medium begins there."""
    columns = torch.empty(3, 0, dtype=torch.long)
    for part in prompt:
        start = int(columns.max()) + 1 if columns.numel() else 0
        grid = part.grid if isinstance(part, Medium) else torch.zeros(3, 1, dtype=torch.long)
        columns = torch.cat([columns, grid + start], dim=1)
    return columns


def check(prompt: list[int | Medium]) -> None:
    tokens, found, delta = positions(prompt)
    assert found.tolist() == expected(prompt).tolist()
    assert delta == int(found.max()) + 1 - len(tokens)


MEDIA = {
    "image": lambda: Medium("image", (1, 2, 3)),
    "video": lambda: Medium("video", (2, 2, 3)),
    "audio": lambda: Medium("audio", (250,)),
}


@pytest.fixture(params=MEDIA)
def medium(request):
    return MEDIA[request.param]()


def framed(medium: Medium) -> list[int | Medium]:
    start, end = (AUDIO_START, AUDIO_END) if medium.kind == "audio" else (VISION_START, VISION_END)
    return [start, medium, end]


@bites("stock", "pr43617")
def test_as_transformers_has_them(medium):
    """(a): upstream's are one late around every medium, up to 0.31."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Reference

    prompt = [TEXT, *framed(medium), TEXT, TEXT, *framed(MEDIA["image"]()), TEXT]
    tokens, found, _ = positions(prompt)
    config = SimpleNamespace(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=VISION_START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=PER_SECOND,
        vision_config=SimpleNamespace(spatial_merge_size=MERGE),
        audio_config=SimpleNamespace(n_window=50),
    )
    reference = bare(Reference, config=config, spatial_merge_size=MERGE)
    scale = torch.tensor([1, MERGE, MERGE])
    media = [part for part in prompt if isinstance(part, Medium)]
    grids = {
        kind: torch.stack([torch.tensor(m.size) * scale for m in media if m.kind == kind])
        if any(m.kind == kind for m in media)
        else None
        for kind in ("image", "video")
    }
    audio = [m.frames for m in media if m.kind == "audio"]
    ids = torch.tensor([tokens])
    right, _ = reference.get_rope_index(
        ids,
        image_grid_thw=grids["image"],
        video_grid_thw=grids["video"],
        attention_mask=torch.ones_like(ids),
        use_audio_in_video=False,
        audio_seqlens=torch.tensor(audio) if audio else None,
        second_per_grids=torch.tensor([SECONDS]) if grids["video"] is not None else None,
    )
    assert found.tolist() == right[:, 0].long().tolist()


@bites("stock", "pr43617")
def test_prompt_that_ends_in_a_mediums_end_token(medium):
    """(b)"""
    check([TEXT, *framed(medium)])


@bites("stock", "pr43617", "newest")
@pytest.mark.parametrize("before", [[], [TEXT]])
def test_prompt_that_ends_in_the_medium_itself(medium, before):
    """(c)"""
    check([*before, medium])


@bites("stock", "pr43617", "newest")
@pytest.mark.parametrize("other", MEDIA)
def test_media_side_by_side(medium, other):
    """(d)"""
    check([TEXT, medium, MEDIA[other](), TEXT])


parts = st.one_of(
    st.just(TEXT),
    st.builds(
        Medium, st.just("image"), st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3))
    ),
    st.builds(
        Medium,
        st.just("video"),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    st.builds(Medium, st.just("audio"), st.tuples(st.integers(8, 300))),
)


@bites("stock", "pr43617", "newest")
@pytest.mark.thinned
@settings(max_examples=examples(200), deadline=None)
@given(st.lists(parts, min_size=1, max_size=8))
def test_any_prompt(prompt):
    check(prompt)


@bites("stock", "pr43617")
@pytest.mark.parametrize("end", [[VISION_END], [VISION_END, TEXT]])
def test_audio_in_video(end):
    """As the newest release has it: the audio's start and end are text, and tokens alternate."""
    video, audio = Medium("video", (2, 1, 2)), Medium("audio", (250,))
    features = [video.feature(1), audio.feature(1)]
    for feature in features:
        feature.data["use_audio_in_video"] = SimpleNamespace(data=torch.tensor(True))
    columns = torch.cat([video.grid, audio.grid], dim=1)
    order = sorted(
        range(columns.size(1)), key=lambda i: (int(columns[0, i]), i >= video.grid.size(1), i)
    )
    kinds = [VIDEO if i < video.grid.size(1) else AUDIO for i in order]
    tokens = [VISION_START, AUDIO_START, *kinds, AUDIO_END, *end]
    found, delta = thinker().get_mrope_input_positions(tokens, features)
    grid = columns[:, order] + 2
    last = int(grid.max())
    text = torch.arange(last + 1, last + 2 + len(end)).expand(3, -1)
    right = torch.cat([torch.arange(2).expand(3, -1), grid, text], dim=1)
    assert found.tolist() == right.tolist()
    assert delta == int(right.max()) + 1 - len(tokens)
