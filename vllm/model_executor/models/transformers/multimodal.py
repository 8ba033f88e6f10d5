# SPDX-License-Identifier: Apache-2.0
"""The Transformers backend: the decoder of Qwen3-VL and its kin gets levels (D16)."""

# release: >=0.32
from vllm.model_executor.models.deepstack import DeepStackMixin


# release: >=0.32
def add_level(layer, args, hidden_states):
    """`hidden_states`: `[1, num_tokens, hidden_size]`."""
    return hidden_states + layer.deepstack[: hidden_states.size(1)]


# release: <0.32
class MultiModalMixin:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        vision_config = getattr(self.config, "vision_config", None)
        if getattr(vision_config, "deepstack_visual_indexes", None):
            logger.warning(
                "The Transformers backend of this vLLM drops the model's DeepStack "
                "features: use --model-impl vllm, or vLLM 0.32.0 and later"
            )


# release: >=0.32
class MultiModalMixin(DeepStackMixin):
    def __init__(self, *, vllm_config, prefix=""):
        ...
        vision_config = getattr(self.config, "vision_config", None)
        levels = getattr(vision_config, "deepstack_visual_indexes", None) or ()
        self.deepstack_num_level = len(levels)
        if levels and self.pp_group.is_first_rank:
            self.use_deepstack = True
            rows = vllm_config.scheduler_config.max_num_batched_tokens
            size = rows, self.text_config.hidden_size
            self.deepstack_input_embeds = [torch.zeros(size) for _ in levels]
            layers = self.model.language_model.layers
            for layer, buffer in zip(layers, self.deepstack_input_embeds):
                layer.register_buffer("deepstack", buffer, persistent=False)
                layer.register_forward_hook(add_level)

    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        given = multimodal_embeddings
        if self._deepstack_buffers and given:
            like = self._deepstack_buffers[0][: len(input_ids)]
            payload, given = self._compute_deepstack_embeds(like, given, is_multimodal)
            if payload is not None:
                self._set_deepstack_input_embeds(payload)
        return super().embed_input_ids(input_ids, given, is_multimodal=is_multimodal)

    def _get_features(self, modality, pixel_values, **kwargs):
        ...
        if self._deepstack_buffers:
            parts = zip(features.pooler_output, *features.deepstack_features)
            features.pooler_output = [torch.cat(part, -1) for part in parts]
        return features.pooler_output  # anchor
