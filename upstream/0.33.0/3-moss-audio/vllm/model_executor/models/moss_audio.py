class MossAudioModel:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        # remove
        self.deepstack_input_embeds: IntermediateTensors | None = None
        ...
        # Fixed storage, which compiled and captured code reads at every step.
        self.deepstack_input_embeds = [
            torch.zeros(
                vllm_config.scheduler_config.max_num_batched_tokens,
                language_config.hidden_size,
            )
            for _ in self.language_model.deepstack_inject_layer_indices
        ]
        self.deepstack_input_embeds_num_tokens = 0

    def _cache_deepstack_input_embeds(
        self, inputs_embeds, deepstack_embeddings, is_multimodal
    ):
        # remove
        if len(deepstack_embeddings) == 0:
            self.deepstack_input_embeds = None
            return
        ...
        # remove
        data = {}
        # remove
        for layer_idx, layer_embeds in enumerate(flat_by_layer):
            scattered = inputs_embeds.new_zeros(inputs_embeds.shape)
            scattered[is_multimodal] = layer_embeds
            data[f"deepstack_input_embeds_{layer_idx}"] = scattered
        # remove
        self.deepstack_input_embeds = IntermediateTensors(data)
        num_tokens = inputs_embeds.size(0)
        for buffer, layer_embeds in zip(self.deepstack_input_embeds, flat_by_layer):
            buffer[:num_tokens][is_multimodal] = layer_embeds
        self.deepstack_input_embeds_num_tokens = num_tokens

    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        ...
        # remove
        self.deepstack_input_embeds = None
        for buffer in self.deepstack_input_embeds:
            buffer[: self.deepstack_input_embeds_num_tokens].zero_()
        self.deepstack_input_embeds_num_tokens = 0
        ...

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if intermediate_tensors is None:
            # remove
            deepstack_input_embeds = self.deepstack_input_embeds
            deepstack_input_embeds = IntermediateTensors(
                {
                    f"deepstack_input_embeds_{layer_idx}": buffer[: positions.size(-1)]
                    for layer_idx, buffer in enumerate(self.deepstack_input_embeds)
                }
            )
        ...
        # remove
        self.deepstack_input_embeds = None
        ...
