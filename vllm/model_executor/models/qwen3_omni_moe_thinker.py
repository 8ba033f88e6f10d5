# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: as Qwen3-VL (D1, D2, D7, D9, D15); images on a Hopper (D8),
M-RoPE positions (D12), short first stages (D13), `prompt_embeds` (D14)."""

from .deepstack import DeepStackMixin, check_embedding_widths


class Qwen3Omni_VisionTransformer:
    # release: >=0.22,<0.24
    def forward(self, x, grid_thw):
        ...
        hidden_states = hidden_states.unsqueeze(1)  # anchor
        # D8: `cu_seqlens` comes from `grid_thw`, on the CPU. Only SDPA reads it there.
        if self.attn_backend != AttentionBackendEnum.TORCH_SDPA:
            cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
        ...


class Qwen3OmniMoeThinkerMultiModalProcessor:
    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        check_embedding_widths(self.info.get_hf_config().vision_config, hf_inputs)
        return super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)


class Qwen3OmniMoeThinkerForConditionalGeneration(DeepStackMixin):
    def __init__(self, *, vllm_config, prefix=""):
        ...
        layers, levels = self.language_model.model.end_layer, self.deepstack_num_level
        if get_pp_group().is_first_rank and layers < levels:
            raise ValueError(  # D13
                f"DeepStack adds {levels} levels to layers 0 to {levels - 1}, but the "
                f"first pipeline stage has layers 0 to {layers - 1} only: use fewer "
                "stages, or set VLLM_PP_LAYER_PARTITION"
            )

    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        size = self.config.text_config.hidden_size
        given = () if multimodal_embeddings is None else multimodal_embeddings
        if vision := [e for e in given if e.size(1) != size]:
            embed = self.language_model.embed_input_ids
            inputs_embeds = self._embed_text_input_ids(
                input_ids, embed, is_multimodal=is_multimodal
            )
            # By token id: with `use_audio_in_video`, a video's and its audio's tokens
            # alternate, and all of the video's embeddings come first (D21). Only image
            # and video tokens have levels (D14).
            ids = input_ids.to(is_multimodal.device)
            rows = (ids == self.config.image_token_id) & is_multimodal
            rows |= (ids == self.config.video_token_id) & is_multimodal
            others = [e for e in given if e.size(1) == size]
            payload, main = self._compute_deepstack_embeds(inputs_embeds, vision, rows)
            self._set_deepstack_input_embeds(payload)
            _merge_multimodal_embeddings(inputs_embeds, main, rows)
            rows = is_multimodal & ~rows
            return _merge_multimodal_embeddings(inputs_embeds, others, rows)
        ...

    def get_mrope_input_positions(self, input_tokens, mm_features):
        """D12. Media take their grids. Text continues after the largest position."""
        grids, token = [], 0
        for offset, modality, data in self.iter_mm_features(mm_features):
            if modality == "audio":
                length = self._compute_audio_token_count(data["audio_feature_length"])
                grid = np.tile(np.arange(length), (3, 1))
            elif data.get("use_audio_in_video"):
                offset += 1  # the audio's start token
                grid, _ = self._compute_interleaved_positions(0, data)
            else:
                grid = np.indices([data[f"grid_{axis}"] for axis in "thw"])
                grid[0] = grid[0] * data["t_factor"]
            grids += [np.tile(np.arange(offset - token), (3, 1)), grid.reshape(3, -1)]
            token = offset + grid[0].size
        grids.append(np.tile(np.arange(len(input_tokens) - token), (3, 1)))
        start = 0
        for i, grid in enumerate(grids):
            grids[i] = grid + start
            start = int(grids[i].max(initial=start - 1)) + 1
        positions = torch.from_numpy(np.concatenate(grids, axis=1))
        return positions, start - len(input_tokens)
