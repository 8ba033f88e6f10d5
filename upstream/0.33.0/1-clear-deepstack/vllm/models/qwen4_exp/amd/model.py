class Qwen4ExpForConditionalGeneration:
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        # Not in forward(): replayed CUDA graphs do not run its Python code.
        self._clear_deepstack_input_embeds(
            getattr(self, "deepstack_input_embeds_num_tokens", 0)
        )
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
        if inputs_embeds is not None and get_pp_group().is_first_rank:
            self._clear_deepstack_input_embeds(inputs_embeds.size(0))
        ...
