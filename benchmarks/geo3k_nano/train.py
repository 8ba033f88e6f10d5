"""Trains the small model on Geo3K-nano, with Transformers' Qwen3-VL classes.

    python -m benchmarks.geo3k_nano.train OUT

Figures are drawn as they are needed, none twice, all from the train split. Where OUT has an
interrupted training, it goes on from there: the same steps then give the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from benchmarks.geo3k import INSTRUCTION

from .drawing import TILE, TILES, draw
from .figures import Figure
from .model import PATCH, SPECIAL, make_model, make_processor
from .questions import QUESTIONS, figure_of, question

IGNORED = -100  # no loss for these
GLYPHS = " 0123456789x°"  # the first is none
GLYPH_CELL = (8, 16)  # pixels, in which there is one glyph's centre at most: half a patch


def response(figure: Figure) -> str:
    return f"{figure.reasoning} Answer: \\boxed{{{figure.answer}}}"


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Batches by their number. The images of a batch are of one size."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int):
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed

    def prompt(self, text: str, image_tokens: int) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": f"{text} {INSTRUCTION}"}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = SPECIAL["image_token"]
        return self.tokenizer.encode(chat.replace(pad, pad * image_tokens))

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, step))
        tiles = rng.integers(TILES[0], TILES[1] + 1, 2)
        width, height = (int(n) * TILE for n in tiles)
        prompts = [self.prompt(text, int(tiles.prod())) for text in QUESTIONS]
        images, rows, labels = [], [], []
        glyphs = np.zeros((self.batch_size, height // GLYPH_CELL[1], width // GLYPH_CELL[0]), int)
        for i in range(self.batch_size):
            figure = figure_of("train", rng)
            drawing = draw(figure, rng, (width, height))
            images.append(np.asarray(drawing.image))
            for glyph, x, y in drawing.glyphs:
                glyphs[i, int(y) // GLYPH_CELL[1], int(x) // GLYPH_CELL[0]] = GLYPHS.index(glyph)
            prompt = prompts[int(rng.integers(len(prompts)))]
            answer = [*self.tokenizer.encode(response(figure)), self.tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "images": torch.from_numpy(np.stack(images)),
            "glyphs": torch.from_numpy(glyphs),
            "input_ids": pad(rows, True, self.tokenizer.pad_token_id),
            "labels": pad(labels, True, IGNORED),
        }


def patches(images: torch.Tensor) -> torch.Tensor:
    """What Qwen3-VL's image processor makes of images that need no resizing.

    `[images, height, width, 3]` of bytes to `[patches, 3 * 2 * 16 * 16]` of [-1, 1]: the
    patches of a merged 2x2 group one after the other, each image as a frame and its copy.
    """
    count, height, width, _ = images.shape
    side, merge, frames = (PATCH[k] for k in ("patch_size", "merge_size", "temporal_patch_size"))
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    grid = (height // side // merge, merge, side, width // side // merge, merge, side)
    pixels = pixels.reshape(count, 3, *grid).permute(0, 2, 5, 3, 6, 1, 4, 7)
    pixels = pixels.unsqueeze(6).expand(*pixels.shape[:6], frames, *pixels.shape[6:])
    return pixels.reshape(-1, 3 * frames * side * side)


def one_size_attention(module, query, key, value, *, cu_seq_lens_q, max_length_q, **_: Any):
    """Attention of `[1, heads, images * patches, dim]` within each image, all in one call.

    Transformers' own calls attention once an image where FlashAttention is not installed.
    """
    images = len(cu_seq_lens_q) - 1
    split = (t[0].unflatten(1, (images, -1)).transpose(0, 1) for t in (query, key, value))
    out = functional.scaled_dot_product_attention(*split)
    return out.permute(0, 2, 1, 3).reshape(1, query.shape[2], *query.shape[1::2]), None


# Transformers hands sequence lengths to what calls itself flash.
ONE_SIZE = "flash_one_size"
AttentionInterface.register(ONE_SIZE, one_size_attention)


class GlyphReader(torch.nn.Linear):
    """Names the glyphs of each patch from the vision tower's last hidden states.

    It is trained with the model and not part of it. Without it, the loss of the answers alone
    stays at what can be said without reading for more than half a million figures.
    """

    CELLS = PATCH["patch_size"] // GLYPH_CELL[0]

    def __init__(self, model: Qwen3VLForConditionalGeneration):
        visual = model.model.visual
        super().__init__(visual.config.hidden_size, self.CELLS * len(GLYPHS))
        visual.merger.register_forward_pre_hook(self.keep)

    def keep(self, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.hidden = inputs[0]

    def loss(self, glyphs: torch.Tensor) -> torch.Tensor:
        """Of the cells `[images, rows, columns]` of the images that the model saw last."""
        count, rows, columns = glyphs.shape
        merge = PATCH["merge_size"]
        grid = (rows // merge, merge, columns // self.CELLS // merge, merge, self.CELLS)
        target = glyphs.reshape(count, *grid).permute(0, 1, 3, 2, 4, 5).flatten()
        weight = torch.ones(len(GLYPHS), device=glyphs.device)
        weight[0] = 0.1  # most cells have none
        scores = self(self.hidden).float().reshape(-1, len(GLYPHS))
        return functional.cross_entropy(scores, target, weight=weight)


def loss_of(model: Qwen3VLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the responses' tokens, in nats each."""
    images, ids, labels = batch["images"], batch["input_ids"], batch["labels"]
    count, height, width, _ = images.shape
    side = PATCH["patch_size"]
    row = ids[:1].cpu()
    positions, _ = model.model.get_rope_index(  # the same for all rows
        row,
        mm_token_type_ids=(row == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, height // side, width // side]]),
    )
    logits = model(
        input_ids=ids,
        position_ids=positions.to(ids.device).expand(-1, count, -1),
        pixel_values=patches(images),
        # To the vision tower images of one size are the frames of a video.
        image_grid_thw=torch.tensor([[count, height // side, width // side]], device=ids.device),
        use_cache=False,
    ).logits
    return functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.inference_mode()
def accuracy(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, count: int, seed: int
) -> float:
    """The share of validation questions whose greedy response is right to the letter."""
    model.eval()
    model.model.visual.config._attn_implementation = "sdpa"
    right = 0
    for start in range(0, count, 100):
        asked = [question("validation", seed, i) for i in range(start, min(start + 100, count))]
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": f"{text.removeprefix('<image>')} {INSTRUCTION}"},
                    ],
                }
            ]
            for _, image, text in asked
        ]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        texts = processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(text == response(figure) for text, (figure, _, _) in zip(texts, asked))
    return right / count


def save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(args: argparse.Namespace, console: Console) -> None:
    processor = make_processor()
    model = make_model(processor.tokenizer, args.seed).to(args.device)
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
    reader = GlyphReader(model).to(args.device)
    both = torch.nn.ModuleDict({"model": model, "reader": reader})
    decayed = [p for p in both.parameters() if p.dim() > 1]
    rest = [p for p in both.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )

    def rate(step: int) -> float:
        """Linear warm-up over a twentieth of the steps, at most 500, then a cosine."""
        warmup = min(500, args.steps // 20 + 1)
        done = (step - warmup) / max(1, args.steps - warmup)
        return step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * done)

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "training.pt", args.out / "training.jsonl"
    recipe = {k: getattr(args, k) for k in ("steps", "batch_size", "lr", "seed")}
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(
                f"{checkpoint} is of another training: {state['recipe']}, not {recipe}; "
                "give its options or another folder"
            )
        both.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        console.print(f"going on at step {first}")
    batches = DataLoader(
        Batches(processor.tokenizer, args.batch_size, args.seed),
        batch_size=None,
        sampler=range(first, args.steps),
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=args.device == "cuda",
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    started = time.monotonic() - seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", completed=first, total=args.steps)
        for step, batch in enumerate(batches, first):
            model.train()
            model.model.visual.config._attn_implementation = ONE_SIZE
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step + 1)
            moved = {k: v.to(args.device, non_blocking=True) for k, v in batch.items()}
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                loss = loss_of(model, moved)
                reading = reader.loss(moved["glyphs"])
            optimizer.zero_grad(set_to_none=True)
            (loss + reading).backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            progress.update(task, advance=1)
            done = step + 1
            if done % args.validate_every == 0 or done == args.steps:
                entry = {
                    "step": done,
                    "seconds": round(time.monotonic() - started, 1),
                    "loss": round(loss.item(), 5),
                    "glyph_loss": round(reading.item(), 5),
                    "accuracy": accuracy(model, processor, args.validate_on, args.seed),
                }
                with log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                console.print(
                    f"step {done}, {entry['seconds']:.0f} s: loss {entry['loss']:.4f}, "
                    f"of glyphs {entry['glyph_loss']:.4f}, "
                    f"validation accuracy {entry['accuracy']:.3f}"
                )
                state = {
                    "weights": both.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "seconds": time.monotonic() - started,
                    "recipe": recipe,
                }
                save(checkpoint, state)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    console.print(f"{args.out / 'model'}: bfloat16")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geo3k_nano.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that draw (default: as many as there are cores)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    parser.add_argument("--validate-every", type=int, default=550, metavar="STEPS")
    parser.add_argument("--validate-on", type=int, default=100, metavar="QUESTIONS")
    train(parser.parse_args(arguments), Console())


if __name__ == "__main__":
    main()
