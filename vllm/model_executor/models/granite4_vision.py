# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: stages under names of its own, and by decoder layer."""

from .deepstack import DeepStackMixin


class Granite4VisionForConditionalGeneration(DeepStackMixin):
    # Up to 0.25.1, `reload_weights` fills buffers beside a parameter with garbage.
    # release: >=0.26
    _ds_buffers = DeepStackMixin.deepstack_input_embeds

    def embed_input_ids(
        self,
        input_ids,
        multimodal_embeddings=None,
        *,
        is_multimodal=None,
        handle_oov_mm_token=True,
    ):
        for buffer in self._ds_buffers:
            buffer[: self._ds_num_tokens].zero_()
        ...
