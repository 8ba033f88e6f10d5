class Ernie4_5_VLMoeForConditionalGeneration:
    # They tell which tokens are visual, also on later pipeline parallel ranks.
    requires_raw_input_tokens = True

    @classmethod
    def get_placeholder_str(cls, modality, i): ...

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if is_multimodal is None or multimodal_embeddings is None:
            return super().embed_input_ids(input_ids)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        ...

        # Not in embed_input_ids(), which dummy runs and later ranks do not call.
        if input_ids is not None:
            self._set_visual_token_mask(input_ids)
            forward_kwargs["visual_token_mask"] = self.visual_token_mask
        # remove
        if self.visual_token_mask is not None:
            if self.visual_token_mask.shape[0] != inputs_embeds.shape[0]:
                padding_len = inputs_embeds.shape[0] - self.visual_token_mask.shape[0]
                # right pad False
                pad = torch.zeros(
                    (padding_len, self.visual_token_mask.shape[1]),
                    dtype=self.visual_token_mask.dtype,
                    device=self.visual_token_mask.device,
                )
                self.visual_token_mask = torch.cat([self.visual_token_mask, pad], dim=0)

            forward_kwargs.update({"visual_token_mask": self.visual_token_mask})
            self.visual_token_mask = None
        ...
