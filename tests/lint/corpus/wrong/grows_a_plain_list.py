"""A plain list of levels is replaced by a longer one when a step has more tokens than rows.

Wrong: graphs read the outgrown tensors, and tensors in a list are not registered.
"""

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class RungsForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.hidden = config.text_config.hidden_size
        start = vllm_config.scheduler_config.max_num_seqs
        self.rungs = [torch.zeros(start, self.hidden) for _ in config.rung_layers]
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _ensure(self, n: int) -> None:
        if n > self.rungs[0].shape[0]:
            self.rungs = [r.new_zeros(n, self.hidden) for r in self.rungs]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        for rung in self.rungs:
            rung.zero_()
        self._ensure(input_ids.size(0))
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        main, *parts = torch.cat(multimodal_embeddings).split(self.hidden, dim=-1)
        embeds[is_multimodal] = main
        for rung, part in zip(self.rungs, parts):
            rung[: embeds.size(0)][is_multimodal] = part  # expect: DS003, DS004
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        rungs = {f"rung_{i}": r[:n] for i, r in enumerate(self.rungs)}
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, rungs=rungs
        )
