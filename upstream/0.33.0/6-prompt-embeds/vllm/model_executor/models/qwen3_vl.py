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

    @staticmethod
    def _recompute_mrope_positions(
        input_ids,
        multimodal_embeddings,
        mrope_positions,
        num_computed_tokens,
        vision_start_token_id,
        image_token_id,
        video_token_id,
    ):
        ...
        for mm in multimodal_embeddings:
            # Text, which has no positions to strip.
            if getattr(mm, "modality", None) == "prompt_embeds":
                mm_embeddings_out.append(mm)
                continue
            ...
        ...
