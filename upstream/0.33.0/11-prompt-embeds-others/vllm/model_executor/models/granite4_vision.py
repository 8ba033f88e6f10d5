import torch.nn.functional as F


class Granite4VisionForConditionalGeneration:
    def embed_input_ids(
        self,
        input_ids,
        multimodal_embeddings=None,
        *,
        is_multimodal=None,
        handle_oov_mm_token=True,
    ):
        ...
        # `prompt_embeds` items are token embeddings without levels: the others have
        # levels, and zeros in place of token embeddings.
        levels_size = lm_h * len(self._ds_layer_indices)
        # remove
        all_packed = torch.cat(
            [t.to(dtype=inputs_embeds.dtype) for t in multimodal_embeddings],
            dim=0,
        )
        all_packed = torch.cat(
            [
                F.pad(t, (levels_size, 0) if t.size(-1) < levels_size else (0, lm_h))
                for t in multimodal_embeddings
            ]
        ).to(dtype=inputs_embeds.dtype)
        # remove
        level_features = all_packed.split(lm_h, dim=-1)  # num_levels tensors
        *level_features, token_embeds = all_packed.split(lm_h, dim=-1)
        token_embeds = token_embeds * lm_inner.config.embedding_multiplier
        inputs_embeds[is_multimodal] = token_embeds
        ...
