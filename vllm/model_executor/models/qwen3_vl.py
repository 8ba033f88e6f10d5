# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: the mixin stages, and no payload outlives its step."""

from .deepstack import DeepStackMixin


class Qwen3VLForConditionalGeneration(DeepStackMixin):
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        # `forward` clears as well, but a full CUDA graph replays without its Python.
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        ...
