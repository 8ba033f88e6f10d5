# SPDX-License-Identifier: Apache-2.0
# release: >=0.24
"""MOSS-Audio: stages in the mixin's buffers, which compiled code sees (D1)."""

from .deepstack import DeepStackMixin
from .utils import StageMissingLayer


class MossAudioModel(DeepStackMixin):
    deepstack_input_embeds = None  # as upstream's: what the decoder gets in a step

    def __init__(self, *, vllm_config, prefix=""):
        ...
        self.use_deepstack = deepstack_k > 0  # the key of compiled decoders (D20)
        if not isinstance(self.audio_encoder, StageMissingLayer):
            rows = vllm_config.scheduler_config.max_num_batched_tokens
            size = rows, language_config.hidden_size
            self._deepstack_buffers = [torch.zeros(size) for _ in range(deepstack_k)]

    def _split_multimodal_embeddings(self, multimodal_embeddings, hidden_size):
        ...
        packed_hidden_size = hidden_size * (deepstack_count + 1)  # anchor
        # D18: `prompt_embeds` have no levels.
        missing = {hidden_size: packed_hidden_size - hidden_size}
        pads = [(0, missing.get(e.shape[-1], 0)) for e in embeddings]
        embeddings = [*map(torch.nn.functional.pad, embeddings, pads)]
        ...

    def _cache_deepstack_input_embeds(
        self, inputs_embeds, deepstack_embeddings, is_multimodal
    ):
        ...
        self._set_deepstack_input_embeds(torch.stack(list(data.values())))

    def embed_input_ids(
        self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
    ):
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        ...

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if intermediate_tensors is None and self._deepstack_buffers:
            self.deepstack_input_embeds = self._get_deepstack_input_embeds(
                len(positions)
            )
        ...
