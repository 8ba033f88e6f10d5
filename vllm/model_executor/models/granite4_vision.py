# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: stages under names of its own, and by decoder layer."""


class Granite4VisionForConditionalGeneration:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        # Beside a parameter, `reload_weights` fills them with garbage up to 0.25.1.
        self.deepstack_buffers = torch.nn.Module()
        for level, buffer in enumerate(self._ds_buffers):
            self.deepstack_buffers.register_buffer(f"{level}", buffer, persistent=False)

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
