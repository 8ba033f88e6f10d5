from vllm.config import (
    CompilationConfig,
    CompilationMode,
    ModelConfig,
    VllmConfig,
    set_current_vllm_config,
)


def test_moss_audio_embed_input_ids_caches_packed_deepstack():
    ...
    # remove
    model.deepstack_input_embeds = None
    model.deepstack_input_embeds = [torch.zeros(5, 8), torch.zeros(5, 8)]
    model.deepstack_input_embeds_num_tokens = 0
    ...
    # remove
    assert model.deepstack_input_embeds is not None
    # remove
    tensors = model.deepstack_input_embeds.tensors
    # remove
    assert set(tensors) == {"deepstack_input_embeds_0", "deepstack_input_embeds_1"}
    # remove
    for tensor in tensors.values():
        assert tensor[is_multimodal].abs().sum() > 0
        assert torch.equal(tensor[~is_multimodal], torch.zeros(2, 8))
    for buffer in model.deepstack_input_embeds:
        assert buffer[is_multimodal].abs().sum() > 0
        assert torch.equal(buffer[~is_multimodal], torch.zeros(2, 8))


@pytest.fixture
def tiny_moss_audio(dist_init, tmp_path, monkeypatch):
    """A model whose decoder returns the DeepStack features that it is given."""
    tiny = {"num_hidden_layers": 0, "num_attention_heads": 1, "num_key_value_heads": 1}
    language_config = Qwen3Config(hidden_size=8, vocab_size=16, **tiny)
    language_config.save_pretrained(tmp_path)
    config = MossAudioConfig(
        audio_config=MossAudioEncoderConfig(
            d_model=8,
            encoder_layers=0,
            encoder_attention_heads=1,
            deepstack_encoder_layer_indexes=[0, 1],
        ),
        language_config=language_config,
        architectures=["MossAudioModel"],
    )
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            str(tmp_path),
            hf_overrides=lambda _: config,
            dtype="float32",
            skip_tokenizer_init=True,
        ),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE),
    )
    with set_current_vllm_config(vllm_config):
        model = MossAudioModel(vllm_config=vllm_config)
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda *_, deepstack_input_embeds, **__: deepstack_input_embeds,
    )
    return model


@torch.inference_mode()
def test_moss_audio_decoder_inputs_are_the_same_with_audio(tiny_moss_audio):
    """Or what is compiled while profiling, without audio, would never read any."""
    embeds, positions = torch.zeros(3, 8), torch.arange(3)
    profiled = tiny_moss_audio(None, positions, inputs_embeds=embeds)

    is_multimodal = torch.tensor([False, True, True])
    embeds = tiny_moss_audio.embed_input_ids(
        torch.tensor([0, 1, 1]), [torch.ones(2, 3 * 8)], is_multimodal=is_multimodal
    )
    served = tiny_moss_audio(None, positions, inputs_embeds=embeds)

    assert all(tensor[is_multimodal].all() for tensor in served.tensors.values())
    assert isinstance(profiled, IntermediateTensors)
    assert {key: tensor.data_ptr() for key, tensor in profiled.items()} == {
        key: tensor.data_ptr() for key, tensor in served.items()
    }


@torch.inference_mode()
def test_moss_audio_features_end_with_their_step(tiny_moss_audio):
    """Also when a CUDA graph is replayed for the step, which skips forward()."""
    tiny_moss_audio.embed_input_ids(
        torch.tensor([1]), [torch.ones(1, 3 * 8)], is_multimodal=torch.tensor([True])
    )
    embeds = tiny_moss_audio.embed_input_ids(torch.tensor([0]))
    read = tiny_moss_audio(None, torch.arange(1), inputs_embeds=embeds)

    assert isinstance(read, IntermediateTensors)
    assert not any(tensor.any() for tensor in read.tensors.values())


def test_moss_audio_pp_forward_routes_deepstack(monkeypatch):
    for first in (True, False):
        ...
        # remove
        model.deepstack_input_embeds = cached
        model.deepstack_input_embeds = list(cached.tensors.values())
        ...
        # remove
        assert kwargs["deepstack_input_embeds"] is (cached if first else inter)
        # remove
        assert model.deepstack_input_embeds is None
        assert kwargs["deepstack_input_embeds"] == (cached if first else inter)
    ...
    # remove
    model.deepstack_input_embeds = IntermediateTensors({})
    ...
