# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: registers and clears its own buffers, one per level."""


class Granite4VisionForConditionalGeneration:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        # D7. Up to 0.25.1, `reload_weights` overwrites the buffers of modules that have
        # parameters. These are in a module that has none.
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
        for buffer in self._ds_buffers:  # D2
            buffer[: self._ds_num_tokens].zero_()
        ...
