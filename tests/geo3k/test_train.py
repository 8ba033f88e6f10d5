"""Training: its shortcuts compute what Transformers computes, and it goes on where it was."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.geo3k_nano.model import make_model, make_processor
from benchmarks.geo3k_nano.train import (
    GLYPHS,
    IGNORED,
    ONE_SIZE,
    Batches,
    GlyphReader,
    loss_of,
    main,
    patches,
)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def batch(processor):
    return Batches(processor.tokenizer, 4, 0)[0]


def test_patches_are_the_image_processors(processor, batch):
    images = [Image.fromarray(image.numpy()) for image in batch["images"]]
    expected = processor.image_processor(images, return_tensors="pt")
    torch.testing.assert_close(patches(batch["images"]), expected["pixel_values"])


def test_prompts_are_the_processors(processor, batch):
    text = processor.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] == IGNORED])
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert text.count("<|image_pad|>") * 32**2 == batch["images"][0, :, :, 0].numel()
    assert "Put the final answer in \\boxed{}.<|im_end|>\n<|im_start|>assistant\n" in text


def test_the_loss_is_transformers_own(processor, batch):
    model = make_model(processor.tokenizer, 0).eval()
    ids = batch["input_ids"]
    images = [Image.fromarray(image.numpy()) for image in batch["images"]]
    with torch.inference_mode():
        model.model.visual.config._attn_implementation = ONE_SIZE
        ours = loss_of(model, batch)
        model.model.visual.config._attn_implementation = "sdpa"
        theirs = model(
            input_ids=ids,
            labels=batch["labels"],
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **processor.image_processor(images, return_tensors="pt"),
        ).loss
    torch.testing.assert_close(ours, theirs)


def test_the_reader_reads_patches_in_their_order(processor, batch):
    reader = GlyphReader(make_model(processor.tokenizer, 0))
    reader.hidden, reader.forward = None, lambda _: certain(batch["glyphs"])
    assert reader.loss(batch["glyphs"]) < 1e-3
    assert reader.loss(batch["glyphs"].flip(2)) > 1


def certain(glyphs: torch.Tensor) -> torch.Tensor:
    """Scores that are sure of each cell, in the order of Qwen3-VL's patches."""
    count, rows, columns = glyphs.shape
    found = []
    for image in range(count):
        for row in range(0, rows, 2):
            for column in range(0, columns, 4):
                for y in (row, row + 1):
                    for x in (column, column + 2):
                        found.append(glyphs[image, y, x : x + 2])
    return 100.0 * torch.nn.functional.one_hot(torch.stack(found), len(GLYPHS)).flatten(1)


def test_all_glyphs_occur(processor):
    seen = Batches(processor.tokenizer, 64, 1)[0]["glyphs"]
    assert seen.unique().tolist() == list(range(len(GLYPHS)))
    assert ((seen > 0).flatten(1).sum(1) >= 2).all()


@pytest.mark.optional
def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    recipe = ["--steps", "4", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    recipe += ["--validate-every", "2", "--validate-on", "1"]
    main([str(tmp_path / "whole"), *recipe])
    steps = iter([2])

    def interrupted(*_):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.geo3k_nano.train.accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([str(tmp_path / "torn"), *recipe])
    main([str(tmp_path / "torn"), *recipe])
    whole, torn = (
        load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "torn")
    )
    assert whole.keys() == torn.keys()
    assert all(torch.equal(whole[name], torn[name]) for name in whole)
    log = [json.loads(line) for line in (tmp_path / "torn" / "training.jsonl").open()]
    assert [entry["step"] for entry in log] == [2, 4]
    with pytest.raises(SystemExit, match="of another training"):
        main([str(tmp_path / "torn"), *recipe, "--lr", "0.1"])
