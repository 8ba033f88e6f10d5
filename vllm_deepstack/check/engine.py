"""One engine's part of the check, in a process of its own: started by `run`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import line
from .compare import Run, compare
from .levels import with_levels, without_levels
from .modes import EAGER, EXTENSION, MODES, Mode
from .probes import (
    IDLE,
    LONGEST,
    Alone,
    Probe,
    Prompts,
    Rows,
    joining,
    limit,
    media_in_pieces,
    media_then_text,
    prefixes,
)
from .processes import STAGE, vllm_name
from .ran import instead, ran
from .report import CHUNKS, SINGLE, WHOLE
from .samples import Sample, with_images
from .stepping import (
    RefusedError,
    Served,
    can_chunk,
    is_pooling,
    pooling,
    replaying,
    run_of,
    sampling,
    step_through,
)

Arrays = dict[str, Any]


def main(job: str, result: str, names: str, options: list[str]) -> None:
    """`names`: a mode, and those that replay on the same engine."""
    mode, *replays = [
        mode for name in names.split(",") for mode in [EAGER, *MODES] if mode.name == name
    ]
    spec, file = Path(job), Path(result)
    version, gpu = vllm_name().partition(" ")[0], on_gpu()
    if missing := mode.missing(version, gpu):
        save(file, {"missing": missing}, {})
        return
    files = {replay: file.with_name(f"{replay.name}.npz") for replay in replays}
    for replay in replays:
        if missing := replay.missing(version, gpu):
            save(files.pop(replay), {"missing": missing}, {})
    if files:
        options = [*options, *EXTENSION]
    served = line.read(options)
    print(f"{STAGE}starting the engine", flush=True)
    llm = line.start(served)
    found = ran(llm)
    about = {"ran": found, "model": served.engine["model"], "notes": served.notes}
    if other := instead(mode, found):
        save(file, {"missing": other} | about, {})
        return
    meta, _ = answer(llm, spec, file, served.chat, about, served.adapters, eager=mode == EAGER)
    if files:
        answer_in_replay(llm, spec, files, meta)


def on_gpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike())


def answer(
    llm: Any,
    spec: Path,
    result: Path,
    chat: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    adapters: Mapping[str, str] | None = None,
    eager: bool = False,
    probing: Probing | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """Writes what the engine gives for a job: of the samples at once, and then all of it, so that
    an engine that dies later has not answered in vain. `chat`: as `line.Line` has it. `about`: the
    engine. `adapters`: folders by name. `probing`: has asked text alone."""
    chat = chat or {}
    job = json.loads(spec.read_text())
    config = llm.llm_engine.vllm_config.model_config
    meta: dict[str, Any] = {
        "vllm": vllm_name(),
        "dtype": str(config.dtype).removeprefix("torch."),
        "gpu": on_gpu(),
        "pooling": is_pooling(llm),
        **(about or {}),
        "chat": chat,
    }
    arrays: Arrays = {}
    if job["probes"] and not probing:
        probing = Probing(llm, flushes=on_gpu() and not eager, adapters=adapters)
        print(f"{STAGE}asking short requests alone", flush=True)
        probing.before_media()
    print(f"{STAGE}generating", flush=True)
    samples = [Sample(**sample) for sample in job["samples"]]
    if job["builtin"]:
        images = limit(config, "image")
        samples = [Sample(s.messages, s.prompt, s.images[:images]) for s in samples]
    arrays |= answers(llm, samples, job["max_tokens"], open_image, chat)
    meta["leaks"] = probing.leaks if probing else None

    def keep() -> None:
        """What there is so far: an engine may die in what it is asked next."""
        for number, (probe, served) in enumerate(probing.alone.found.items() if probing else ()):
            if served.run:
                arrays[f"alone_{number}"] = np.array(repr(probe))
                arrays[f"alone_tokens_{number}"] = served.run.tokens
                arrays[f"alone_logits_{number}"] = served.run.logits
        save(result, meta, arrays)

    keep()
    if probing:
        print(f"{STAGE}looking for leaks", flush=True)
        probing.keep = keep
        probing.after_media()
        if eager:
            meta["shares"] = shares(probing.alone, samples, arrays, chat)
        meta["done"] = True
        keep()
    return meta, arrays


def answer_in_replay(llm: Any, spec: Path, files: dict[Mode, Path], eager: dict[str, Any]) -> None:
    """Writes what the engine gives where steps are replayed, for each mode. `eager`: what it gave
    before."""
    print(f"{STAGE}recording", flush=True)
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"  # whose rows: a CPU has V1 alone
    try:
        (recorded,) = llm.collective_rpc("replay_record", args=(v2,))
    except Exception as error:  # of the model's code
        recorded = {"refused": f"cannot be recorded: {error}"}
    for mode, file in files.items():
        began = time.monotonic()
        if reason := recorded.get("refused"):
            save(file, {"missing": reason}, {})
            continue
        print(f"{STAGE}{mode.name}: asking text alone", flush=True)
        python, probing = (Probing(llm, True, mode, recorded["sizes"][-1]) for _ in range(2))
        for by, each in (("python", python), ("graph", probing)):
            each.alone.flush()
            with replaying(llm, mode.name, by):
                each.before_media()
        if (most := apart_in_text(python, probing)) > 0:
            reason = f"text alone, replayed, is {most:.2g} off Python on as many rows"
            save(file, {"missing": reason}, {})
            continue
        # The engine has seen media by now: where it is broken, text is not moved by text alone.
        probing.leaks["text"] = eager["leaks"]["text"]
        about = {name: eager[name] for name in ("ran", "model", "notes")}
        with replaying(llm, mode.name):
            meta, arrays = answer(llm, spec, file, eager["chat"], about, probing=probing)
        (counts,) = llm.collective_rpc("replay_counts")
        meta |= {"seconds": time.monotonic() - began, "warnings": recorded["warnings"]}
        meta["ran"] = meta["ran"] | {"replayed": counts["replayed"]}
        if counts["problems"] or not counts["replayed"]:
            meta = {"missing": "; ".join(counts["problems"]) or "no step was replayed"}
        save(file, meta, arrays)


def apart_in_text(ours: Probing, theirs: Probing) -> float:
    """How far the same requests are apart, each alone and in the company of others."""
    moved = []
    for probe, served in ours.alone.found.items():
        other = theirs.alone.found[probe]
        if served.run and other.run:
            moved.append(compare(served.run, other.run).largest)
    for kind, rows in ours.leaks["text"].items():
        for one, other in zip(rows, theirs.leaks["text"][kind]):
            steps = [row["difference"]["by_step"] for row in (one, other) if row["difference"]]
            moved += [abs(a - b) for a, b in zip(*steps)] if steps else []
    return max(moved)


def save(result: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    part = result.with_suffix(".part.npz")
    np.savez(part, meta=np.array(json.dumps(meta)), **arrays)
    part.replace(result)


def answers(
    llm: Any, samples: list[Sample], max_tokens: int, opened: Any, chat: dict[str, Any]
) -> Arrays:
    config = llm.llm_engine.vllm_config.model_config
    image_token = image_token_id(config.hf_config)
    arrays: Arrays = {}
    for i, output in enumerate(generate(llm, samples, max_tokens, opened, chat)):
        arrays[f"prompt_{i}"] = np.array(output.prompt_token_ids)
        arrays[f"images_{i}"] = np.array(len(samples[i].images))
        arrays[f"image_tokens_{i}"] = np.array(output.prompt_token_ids.count(image_token))
        run = run_of(output, config.get_vocab_size())
        arrays[f"tokens_{i}"], arrays[f"logits_{i}"] = run.tokens, run.logits
    return arrays


def generate(
    llm: Any, samples: list[Sample], max_tokens: int, opened: Any, chat: dict[str, Any]
) -> list[Any]:
    """All samples, in flight together; those that are chats go through the chat template."""
    if is_pooling(llm):
        marks = Prompts(llm).placeholders.get("image", "")
        prompts = [raw_prompt(s, opened, marks * len(s.images)) for s in samples]
        return llm.encode(prompts, **pooling(llm), use_tqdm=False)
    raw = [s.prompt is not None for s in samples]
    tokenizer = llm.get_tokenizer()
    template = chat.get("chat_template") or getattr(tokenizer, "chat_template", None)
    if not any(s.images for s in samples) and template is None:
        raw = [True] * len(samples)

    def part(path: str) -> dict[str, Any]:
        return {"type": "image_pil", "image_pil": opened(path)}

    chats = [with_images(s, part) for s, is_raw in zip(samples, raw) if not is_raw]
    prompts = [raw_prompt(s, opened) for s, is_raw in zip(samples, raw) if is_raw]
    how = {"sampling_params": sampling(max_tokens), "use_tqdm": False}
    done = iter(llm.chat(chats, **how, **chat) if chats else [])
    done_raw = iter(llm.generate(prompts, **how) if prompts else [])
    return [next(done_raw if is_raw else done) for is_raw in raw]


def open_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_blank(path: str) -> Image.Image:
    return Image.new("RGB", open_image(path).size, "gray")


def raw_prompt(sample: Sample, opened: Any, before: str = "") -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": before + sample.text()}
    if sample.images:
        prompt["multi_modal_data"] = {"image": [opened(path) for path in sample.images]}
    return prompt


def image_token_id(config: Any) -> int | None:
    """The token that stands for a piece of an image, if the model's config says which."""
    for part in (config, getattr(config, "thinker_config", None)):
        for name in ("image_token_id", "image_token_index"):
            if (token := getattr(part, name, None)) is not None:
                return token
    return None


class Probing:
    """Streams of short requests, and what each of them gets alone. `replay`: the mode in which an
    engine replays steps of up to `captured` tokens."""

    def __init__(
        self,
        llm: Any,
        flushes: bool,
        replay: Mode | None = None,
        captured: int = 0,
        adapters: Mapping[str, str] | None = None,
    ):
        self.llm, self.replay, self.prompts = llm, replay, Prompts(llm)
        self.config = llm.llm_engine.vllm_config
        sizes = self.config.compilation_config.cudagraph_capture_sizes
        self.captured = captured or max(sizes or [0])
        in_python = partial(replaying, llm, "run") if replay else nullcontext
        self.alone = Alone(llm, self.prompts, flushes, in_python, adapters or {})
        self.leaks: dict[str, Any] = {"text": {}, "streams": {}, "kinds": {}, "not_run": {}}
        self.keep: Callable[[], None] = lambda: None
        """Called after each stream."""

    def before_media(self) -> None:
        """What text gets alone; and in company in which nobody has a medium, for each kind of
        steps: whole prompts, chunks of them, and one token of a prompt a step."""
        cached = [p for p in self._prefixes() if not self._too_long(p)]
        stream, single = media_then_text(), media_in_pieces(12)
        later = [] if self.replay or is_pooling(self.llm) else self._grammars()
        later += self._adapted() if self.alone.adapters else []
        every = [*stream, *single, *cached]
        self.alone.ask(p for p in every if p.medium is None)
        with suppress(RefusedError):  # the streams say it
            self.alone.ask(p for p in later if p.medium is None)
        kinds = {WHOLE: (stream, 0)}
        if can_chunk(self.llm):
            kinds |= {CHUNKS: (stream, max(4, min(self.captured // 5, 16))), SINGLE: (single, 1)}
        for kind, (probes, tokens) in kinds.items():
            text = [replace(p, medium=None, words=p.words + 20) for p in probes]
            self.leaks["text"][kind] = self.alone.in_stream(text, tokens)

    def after_media(self) -> None:
        """Streams in which requests have media: of each kind that the limits allow."""
        not_run, marks = self.leaks["not_run"], self.prompts.placeholders
        if not marks:
            not_run["media, then text"] = "the model takes no images, videos or audio"
        for modality in marks:
            together = f"{modality}, then text"
            if not marks[modality]:
                not_run[together] = f"what stands for {modality} in a prompt is not known"
                continue
            self._serve(together, partial(self._media_then_text, together, modality))
            trickling = f"{modality} beside text, a token a step"
            self._serve(trickling, partial(self._media_in_pieces, modality), SINGLE)
        known = [modality for modality in marks if marks[modality]]
        if known and self.config.cache_config.enable_prefix_caching:
            name = "the same text again, from the prefix cache"
            self._serve(name, partial(self._from_the_cache, known[0]))
        if known and self.replay:
            self._serve("features staged in each row, then text", partial(self._poisoned, known[0]))
        if self.replay or is_pooling(self.llm):
            return
        grammars, adapted = self._grammars, self._adapted
        self._serve("with a grammar beside without", lambda: self.alone.in_stream(grammars(), 0))
        if self.alone.adapters:
            name = "with an adapter beside without"
            self._serve(name, lambda: self.alone.in_stream(adapted(), 0))

    def _grammars(self) -> list[Probe]:
        return [
            replace(p, medium=None, grammar=n % 2 == 1) for n, p in enumerate(media_then_text())
        ]

    def _adapted(self) -> list[Probe]:
        names, modality = ["", *self.alone.adapters], next(iter(self.prompts.placeholders), "")
        stream = media_then_text(modality=modality)
        if not self.prompts.placeholders.get(modality):
            stream = [replace(p, medium=None) for p in stream]
        return [replace(p, adapter=names[n % len(names)]) for n, p in enumerate(stream)]

    def _serve(self, name: str, stream: Callable[[], Rows | str], kind: str = WHOLE) -> None:
        """Keeps a stream's requests, or why it was not run; and which kind of steps it has."""
        self.leaks["kinds"][name] = kind
        try:
            found = stream()
        except RefusedError as error:
            found = f"refused: {error}"
        self.leaks["not_run" if isinstance(found, str) else "streams"][name] = found
        self.keep()

    def _media_then_text(self, name: str, modality: str) -> Rows:
        stream = media_then_text(modality=modality)
        longest = self._longest(stream)
        captured = self.captured
        if 0 < captured < longest:
            self.leaks["not_run"][f"graphs replayed with a whole {modality}"] = (
                f"it takes {longest} tokens, and graphs are captured for {captured}"
            )
        fits = captured // 5 if can_chunk(self.llm) and captured < 5 * longest else 0
        self.leaks["kinds"][name] = CHUNKS if fits else WHOLE
        return self.alone.in_stream(stream, fits)

    def _media_in_pieces(self, modality: str) -> Rows | str:
        if not can_chunk(self.llm):
            return "needs chunked prefill that may cut media, and VLLM_ENABLE_V1_MULTIPROCESSING=0"
        longest = self._longest(media_in_pieces(1, modality=modality))
        if longest > LONGEST:
            return f"a prompt takes {longest} tokens"
        return self.alone.in_stream(media_in_pieces(longest, modality=modality), 1)

    def _prefixes(self) -> tuple[Probe, Probe]:
        return prefixes(self.config.cache_config.block_size)

    def _too_long(self, probe: Probe) -> bool:
        return probe.words + probe.max_tokens > self.config.model_config.max_model_len

    def _from_the_cache(self, modality: str) -> Rows | str:
        """A text after a medium; later, where nothing is staged, one that begins as it does: what
        the first had wrong is in the prefix cache."""
        first, again = self._prefixes()
        if self._too_long(again):
            return f"a block of the cache is {self.config.cache_config.block_size} tokens"
        fits = self.captured if can_chunk(self.llm) and 0 < self.captured < first.words else 0
        rows = self.alone.in_stream([media_then_text(1, modality)[0], first], fits)
        self.alone.flush()
        with self.alone.in_python():
            (row,) = self.alone.in_stream([again], 0, cached=True)
        later = rows[-1]["ended"] + 2
        return [*rows, row | {"joined": row["joined"] + later, "ended": row["ended"] + later}]

    def _poisoned(self, modality: str) -> Rows:
        assert self.replay
        stream = media_then_text(2, modality)
        text = [replace(p, joins_after=IDLE) for p in stream if p.medium is None]
        with replaying(self.llm, self.replay.name, "poison"):
            return self.alone.in_stream([stream[0], *text], 0)

    def _longest(self, stream: list[Probe]) -> int:
        """Tokens of its longest prompt with a medium."""
        media = [probe for probe in stream if probe.medium is not None]
        self.alone.ask(media)
        return max(len(self.alone.found[probe].prompt) for probe in media)


def shares(
    alone: Alone, samples: list[Sample], arrays: Arrays, chat: dict[str, Any]
) -> dict[str, Any]:
    """How far the first token's logits move without the media, and without DeepStack's levels;
    None where that cannot be said."""
    llm, modality = alone.llm, next(iter(alone.prompts.placeholders), "")
    seen = [i for i, sample in enumerate(samples) if sample.images]
    found: dict[str, Any] = {"modality": modality, "blank": None, "levels": None}
    found["configured"] = configured(llm.llm_engine.vllm_config.model_config.hf_config)
    if not seen and not modality:
        return found
    print(f"{STAGE}generating without the {modality or 'image'}s", flush=True)

    def largest(opened: Any, prompts: Prompts) -> float | None:
        llm.reset_prefix_cache()
        moved = []
        if seen:
            chosen = [samples[i] for i in seen]
            given = answers(llm, chosen, 1, opened, chat)
            for at, i in enumerate(seen):
                moved.append(apart(given[f"logits_{at}"], arrays[f"logits_{i}"]))
        for probe, served in alone.found.items():
            if probe.medium is not None and not seen:
                one = joining(replace(probe, max_tokens=1), prompts, alone.adapters)
                (other,) = step_through(llm, [one])
                if isinstance(other, Served) and other.run and served.run:
                    moved.append(apart(other.run.logits, served.run.logits))
        return max(moved, default=None)

    found["blank"] = largest(open_blank, Prompts(llm, blank=True))
    if any(llm.apply_model(without_levels)):
        moved = largest(open_image, alone.prompts)
        found["levels"] = moved if all(llm.apply_model(with_levels)) else None
    return found


def configured(config: Any) -> int:
    """How many DeepStack levels a model's configuration has, as Qwen3-VL's and its kin's say it."""
    vision = getattr(getattr(config, "thinker_config", config), "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of first tokens."""
    return compare(*(Run(np.zeros(1, np.int64), each[:1]) for each in (ours, theirs))).first


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
