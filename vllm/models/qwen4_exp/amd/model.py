# SPDX-License-Identifier: Apache-2.0
# release: >=0.29
"""Qwen4-Exp: clears in its own `embed_input_ids` (D2). It inherits the rest."""


class Qwen4ExpForConditionalGeneration:
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        ...
