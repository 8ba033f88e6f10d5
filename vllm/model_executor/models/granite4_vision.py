# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: lists and clears its own buffers, one per level."""

from .deepstack import DeepStackMixin


class Granite4VisionForConditionalGeneration:
    _deepstack_buffers = property(lambda self: self._ds_buffers)
    named_buffers = DeepStackMixin.named_buffers  # D7

    def embed_input_ids(
        self,
        input_ids,
        multimodal_embeddings=None,
        *,
        is_multimodal=None,
        handle_oov_mm_token=True,
    ):
        for buffer in self._ds_buffers:  # D2
            buffer[: self._ds_num_tokens].zero_()
        ...
