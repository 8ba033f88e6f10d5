class Qwen3VLForConditionalGeneration:
    def _compute_deepstack_embeds(
        self, inputs_embeds, multimodal_embeddings, is_multimodal
    ):
        # `prompt_embeds` items have no DeepStack levels.
        multimodal_embeddings = [
            F.pad(embeds, (0, self.multiscale_dim))
            if embeds.size(1) == self.visual_dim
            else embeds
            for embeds in multimodal_embeddings
        ]
        ...
