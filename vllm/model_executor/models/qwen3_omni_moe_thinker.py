# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Omni's thinker: the mixin stages, and no payload outlives its step."""

from .deepstack import DeepStackMixin


class Qwen3Omni_VisionTransformer:
    # release: >=0.22,<0.24
    def forward(self, x, grid_thw):
        ...
        hidden_states = hidden_states.unsqueeze(1)
        # `grid_thw`, from which they come, is on the CPU; SDPA alone reads them there.
        if self.attn_backend != AttentionBackendEnum.TORCH_SDPA:
            cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
        ...


class Qwen3OmniMoeThinkerForConditionalGeneration(DeepStackMixin):
    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        # `forward` clears as well, but a full CUDA graph replays without its Python.
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        ...
        input_ids_cpu = input_ids.cpu()
        is_vision = is_multimodal & (input_ids_cpu != audio_token_id)
        multimodal_embeddings = self._stage_deepstack_input_embeds(
            multimodal_embeddings, is_vision
        )
        ...

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        self._move_deepstack_input_embeds(inputs_embeds)
        ...
