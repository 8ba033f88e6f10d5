def _make_inputs(input_type, num_reqs):
    if input_type == "text_and_image":
        texts = [TextPrompt(prompt=f"{i} plus {i} is") for i in range(num_reqs)]
        images = _make_inputs("image", num_reqs)
        return texts + [prompt for pair in zip(images, texts) for prompt in pair]
    ...


@skip_if_not_cuda_alike
def test_vlm_batch_invariance_texts_and_images(monkeypatch: pytest.MonkeyPatch):
    """Texts are the same before any image, after one, and in one batch with some.

    Features of a step's images wait in buffers, which its CUDA graph reads.
    """
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    _run_vlm_batch_invariance("text_and_image", "FLASH_ATTN", enforce_eager=False)
