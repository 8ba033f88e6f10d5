# SPDX-License-Identifier: Apache-2.0
# release: >=0.30
"""Cohere Compass: the changes of Qwen3-VL, whose methods it copied."""

from .deepstack import DeepStackMixin, check_embedding_widths


class CohereCompassMultiModalProcessor:
    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        check_embedding_widths(self.info.get_hf_config().vision_config, hf_inputs)
        ...


class CohereCompassForConditionalGeneration(DeepStackMixin):
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        ...

    def recompute_mrope_positions(
        self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
    ):
        args = input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
        if found := self._recompute_media_positions(*args):
            return found
        ...

    def get_encoder_cudagraph_config(self):
        ...
        modalities = [] if self.is_multimodal_pruning_enabled else ["image"]  # anchor
        if self.multimodal_config.enable_mm_embeds:
            modalities = []  # D18: an encoder's graph takes pixels alone
        ...
