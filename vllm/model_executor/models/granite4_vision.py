# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: lists and clears its own buffers, one per level."""

from .deepstack import DeepStackMixin, rows_with_levels


class Granite4VisionLLMForCausalLM:
    def make_empty_intermediate_tensors(self, batch_size, dtype, device):
        ...
        for llm_layer in getattr(self, "_ds_layer_indices", []):
            if llm_layer < self.model.start_layer:
                continue  # D19: an earlier stage keeps it
            ...
        ...


class Granite4VisionForConditionalGeneration:
    _deepstack_buffers = property(lambda self: self._ds_buffers)
    _ds_staged = 0
    named_buffers = DeepStackMixin.named_buffers  # D7
    use_deepstack = DeepStackMixin.use_deepstack  # D20

    def __init__(self, *, vllm_config, prefix=""):
        ...
        mm = vllm_config.model_config.multimodal_config
        self.use_deepstack = mm.enable_mm_embeds or mm.get_limit_per_prompt("image") > 0
        # D19: a stage without images sends no levels.
        if not self.use_deepstack:
            self._ds_layer_indices = self.language_model._ds_layer_indices = []

    def embed_input_ids(
        self,
        input_ids,
        multimodal_embeddings=None,
        *,
        is_multimodal=None,
        handle_oov_mm_token=True,
    ):
        for buffer in self._ds_buffers:  # D2
            buffer[: self._ds_staged].zero_()
        ...
        N, lm_h = inputs_embeds.shape  # anchor
        given = multimodal_embeddings
        text = [e for e in given if e.size(1) == lm_h]
        if text:  # D18: `prompt_embeds` are in place of tokens', and have no levels
            vision = rows_with_levels(lm_h, given, is_multimodal)
            embeds = torch.cat(text).to(inputs_embeds)
            rows, is_multimodal = is_multimodal & ~vision, vision
            inputs_embeds[rows] = embeds * lm_inner.config.embedding_multiplier
            none = embeds.new_zeros(0, lm_h * len(self._ds_buffers))
            multimodal_embeddings = [e for e in given if e.size(1) > lm_h] or [none]
        ...
        self._ds_num_tokens = N  # anchor
        # D19: `forward` clears no rows. What later stages get is sent after it.
        self._ds_staged, self._ds_num_tokens = N, 0
        ...
