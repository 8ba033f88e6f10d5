# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5-VL: its mask of visual tokens ends with its step (D2)."""


class Ernie4_5_VLMoeForConditionalGeneration:
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self.visual_token_mask = None
        ...
