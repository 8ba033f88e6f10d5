class Qwen3VLForConditionalGeneration:
    def _compute_deepstack_embeds(
        self, inputs_embeds, multimodal_embeddings, is_multimodal
    ):
        # `prompt_embeds` come among them, without levels.
        width = self.visual_dim + self.multiscale_dim
        multimodal_embeddings = [
            embeds
            if embeds.size(1) == width
            else F.pad(embeds, (0, width - embeds.size(1)))
            for embeds in multimodal_embeddings
        ]
        ...
