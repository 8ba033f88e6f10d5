class Granite4VisionForConditionalGeneration:
    def embed_input_ids(
        self,
        input_ids,
        multimodal_embeddings=None,
        *,
        is_multimodal=None,
        handle_oov_mm_token=True,
    ):
        # Not in forward(): replayed CUDA graphs do not run its Python code.
        for buf in self._ds_buffers:
            buf[: self._ds_num_tokens].zero_()
        self._ds_num_tokens = 0
        ...
        if not has_vision:
            # remove
            self._ds_num_tokens = 0
            ...
        ...
        for level_idx in range(len(self._ds_layer_indices)):
            ...
            # remove
            target.zero_()
            ...
        ...

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        ...
        # remove: a replayed CUDA graph does not run it
        if (
            inputs_embeds is not None
            and get_pp_group().is_first_rank
            and self._ds_num_tokens > 0
        ):
            n = self._ds_num_tokens
            for buf in self._ds_buffers:
                buf[:n].zero_()
            self._ds_num_tokens = 0
        ...
