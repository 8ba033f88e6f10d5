# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: lists and clears its own buffers, one per level."""

from .deepstack import DeepStackMixin


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
    named_buffers = DeepStackMixin.named_buffers  # D7
    use_deepstack = DeepStackMixin.use_deepstack  # D20

    def __init__(self, *, vllm_config, prefix=""):
        ...
        model_config = vllm_config.model_config
        self.use_deepstack = MULTIMODAL_REGISTRY.supports_multimodal_inputs(
            model_config
        )
        if not self.use_deepstack:  # D19: its first stage sends no levels
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
            buffer[: self._ds_num_tokens].zero_()
        ...
        N, lm_h = inputs_embeds.shape
        narrow = [e for e in multimodal_embeddings if e.size(1) == lm_h]
        if narrow:  # D18: `prompt_embeds` are in place of tokens', and have no levels
            sizes = torch.tensor([e.size() for e in multimodal_embeddings])
            rows = (sizes[:, 1] == lm_h).repeat_interleave(sizes[:, 0])
            rows = is_multimodal.masked_scatter(is_multimodal, rows.to(is_multimodal))
            embeds = torch.cat(narrow).to(inputs_embeds)
            inputs_embeds[rows] = embeds * lm_inner.config.embedding_multiplier
            wide = lm_h * len(self._ds_buffers)
            multimodal_embeddings = [
                e.new_zeros(len(e), wide) if e.size(1) == lm_h else e
                for e in multimodal_embeddings
            ]
        ...

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        # D19: later stages' levels are sent from the buffers, and after `forward`.
        staged, self._ds_num_tokens = self._ds_num_tokens, 0
        ...
        self._ds_num_tokens = staged
        return hidden_states
