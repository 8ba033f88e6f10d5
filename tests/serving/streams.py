"""Streams of requests, as Hypothesis draws and shrinks them, and the prompts they stand for."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from vllm_deepstack.check.samples import drawing

MAX_MODEL_LEN = 512
LIMITS = {"image": 3, "video": 1, "audio": 1}
SAMPLE_RATE = 16_000
EMBEDS_TOKEN = 17  # any that no prompt has: `Text` draws from 20 on
# Placeholders by modality; the processor puts a modality's tokens in place of the middle one.
MARKS = {
    "image": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "video": ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
    "audio": ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
}


@dataclass(frozen=True)
class Text:
    tokens: int
    seed: int = 0

    def ids(self) -> list[int]:
        """Ordinary tokens of any vocabulary."""
        return np.random.default_rng(self.seed).integers(20, 300, self.tokens).tolist()


@dataclass(frozen=True)
class Picture:
    width: int
    height: int
    seed: int = 0

    modality = "image"

    def tokens(self) -> int:
        """With a processor that neither enlarges nor shrinks it."""
        return round(self.width / 32) * round(self.height / 32)

    def content(self) -> Image.Image:
        return drawing(self.seed).resize((self.width, self.height))


@dataclass(frozen=True)
class Video:
    frames: int
    seed: int = 0

    modality = "video"

    def content(self) -> tuple[np.ndarray, dict[str, Any]]:
        frames = [drawing(self.seed + i).resize((64, 64)) for i in range(self.frames)]
        metadata = {
            "fps": 2.0,
            "total_num_frames": self.frames,
            "duration": self.frames / 2,
            "frames_indices": list(range(self.frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        return np.stack([np.asarray(frame) for frame in frames]), metadata


@dataclass(frozen=True)
class Audio:
    milliseconds: int
    seed: int = 0

    modality = "audio"

    def content(self) -> tuple[np.ndarray, int]:
        """A tone in noise: of noise alone, encoders make much the same."""
        random = np.random.default_rng(self.seed)
        seconds = np.arange(self.milliseconds * SAMPLE_RATE // 1000) / SAMPLE_RATE
        tone = np.sin(2 * np.pi * random.uniform(100, 4000) * seconds)
        noise = random.normal(0, 0.01, len(seconds))
        return (0.5 * tone + noise).astype(np.float32), SAMPLE_RATE


@dataclass(frozen=True)
class Embeds:
    """A `prompt_embeds` part, of a request that has a medium as well."""

    tokens: int
    seed: int = 0

    def content(self, hidden_size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return 0.1 * torch.randn(self.tokens, hidden_size, generator=generator)


ERNIE = ("<|IMAGE_START|>", "<|image@placeholder|>", "<|IMAGE_END|>")


def marks(tokenizer: Any, modality: str) -> list[int]:
    """Tokens of a modality, which Cohere Compass spells in capitals, and Ernie otherwise."""
    known = tokenizer.get_vocab()
    if ERNIE[1] in known and modality == "image":
        return tokenizer.convert_tokens_to_ids(list(ERNIE))
    names = [mark if mark in known else mark.upper() for mark in MARKS[modality]]
    return tokenizer.convert_tokens_to_ids(names)


@dataclass(frozen=True)
class Request:
    parts: tuple[Text | Picture | Video | Audio | Embeds, ...]
    max_tokens: int = 1
    closed: bool = True
    """Whether the last part, if it is not text, has its end mark: without it, the prompt's
    last token is one of an image's."""
    joins_after: int = field(default=0, compare=False)
    """Engine steps between the request before and this one."""
    bare: bool = False
    """Whether media have neither start nor end marks."""
    adapter: str = ""
    """The folder of a LoRA adapter."""

    def prompt(self, tokenizer: Any, hidden_size: int = 0) -> dict[str, Any]:
        """As vLLM takes it: token ids with placeholders, and what they stand for."""
        ids: list[int] = []
        data: dict[str, list[Any]] = {}
        embeds: list[torch.Tensor] = []
        for part in self.parts:
            if isinstance(part, Text):
                ids += part.ids()
            elif isinstance(part, Embeds):
                ids.append(EMBEDS_TOKEN)
                embeds.append(part.content(hidden_size))
            elif self.bare:
                ids.append(marks(tokenizer, part.modality)[1])
                data.setdefault(part.modality, []).append(part.content())
            else:
                ids += marks(tokenizer, part.modality)
                data.setdefault(part.modality, []).append(part.content())
        if not (self.closed or self.bare or isinstance(self.parts[-1], (Text, Embeds))):
            ids.pop()
        # The same content always gives the same hash, or the cache of prefixes never hits.
        uuids = {
            modality: [
                str(zlib.crc32(repr(part).encode()))
                for part in self.parts
                if not isinstance(part, (Text, Embeds)) and part.modality == modality
            ]
            for modality in data
        }
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if embeds:  # as vLLM's renderer has them of a chat's `prompt_embeds` parts
            prompt["_prompt_embeds"] = embeds, EMBEDS_TOKEN
        return prompt | ({"multi_modal_data": data, "multi_modal_uuids": uuids} if data else {})


def streams(
    modalities: tuple[str, ...], budget: int, max_size: int = 12
) -> st.SearchStrategy[list[Request]]:
    """Streams of up to `max_size` requests. Some repeat an earlier one, from its start.

    Where steps take `budget` tokens, some prompts that end in an image leave its last token
    for a step of its own.
    """
    seeds = st.integers(0, 3)
    text = st.builds(Text, st.integers(1, 40), seeds)
    picture = st.builds(Picture, st.integers(48, 256), st.integers(48, 256), seeds)
    kinds: dict[str, st.SearchStrategy[list[Any]]] = {
        "image": st.lists(picture, min_size=1, max_size=LIMITS["image"]),
        "video": st.lists(st.builds(Video, st.sampled_from([2, 4]), seeds), min_size=1, max_size=1),
        "audio": st.lists(st.builds(Audio, st.integers(200, 2000), seeds), min_size=1, max_size=1),
    }

    @st.composite
    def request(draw: st.DrawFn) -> Request:
        parts: list[Any] = [draw(text)]
        media = [modality for modality in modalities if modality in kinds]
        chosen = draw(st.lists(st.sampled_from(["image", "image", *media]), max_size=2))
        for modality in dict.fromkeys(chosen):
            for part in draw(kinds[modality]):
                parts.insert(draw(st.integers(0, len(parts))), part)
        if "prompt_embeds" in modalities and len(parts) > 1:
            for part in draw(st.lists(st.builds(Embeds, st.integers(1, 9), seeds), max_size=2)):
                parts.insert(draw(st.integers(0, len(parts))), part)
        ending = draw(st.sampled_from(["text", "mark", "image"]))
        if ending == "text":
            parts.append(draw(text))
        elif ending == "image":
            last = next((part for part in parts if isinstance(part, Picture)), None)
            if last:
                parts.remove(last)
            parts.append(last or draw(picture))
            counted = all(isinstance(part, (Text, Picture, Embeds)) for part in parts)
            if counted and budget <= 128 and draw(st.booleans()):
                length = sum(p.tokens() + 2 if isinstance(p, Picture) else p.tokens for p in parts)
                length -= 1
                first = next(i for i, part in enumerate(parts) if isinstance(part, Text))
                missing = (1 - length) % budget
                parts[first] = Text(parts[first].tokens + missing, parts[first].seed)
        return Request(
            tuple(parts),
            max_tokens=draw(st.integers(1, 10)),
            closed=ending != "image",
            joins_after=draw(st.integers(0, 6)),
        )

    @st.composite
    def stream(draw: st.DrawFn) -> list[Request]:
        requests = draw(st.lists(request(), min_size=1, max_size=max_size))
        for repeated in draw(st.lists(st.sampled_from(requests), max_size=max_size // 3)):
            requests.append(repeated)
        return requests

    return stream()
