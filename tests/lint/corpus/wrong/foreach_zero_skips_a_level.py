"""torch._foreach_zero_ clears all levels but the first, and _foreach_copy_ stages all of them.

Wrong: the first level outlives its step.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class StrataForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        hf = vllm_config.model_config.hf_config
        shape = (vllm_config.scheduler_config.max_num_batched_tokens, hf.text_config.hidden_size)
        self.num_strata = hf.num_strata
        for i in range(self.num_strata):
            self.register_buffer(f"stratum_{i}", torch.zeros(shape), persistent=False)
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def _strata(self):
        return [getattr(self, f"stratum_{i}") for i in range(self.num_strata)]

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        strata = self._strata()
        torch._foreach_zero_(strata[1:])
        embeds = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embeds
        main, *rest = torch.cat(multimodal_embeddings).chunk(self.num_strata + 1, dim=-1)
        embeds[is_multimodal] = main
        payload = [torch.zeros_like(embeds) for _ in rest]
        for p, r in zip(payload, rest):
            p[is_multimodal] = r
        torch._foreach_copy_([s[: len(input_ids)] for s in strata], payload)  # expect: DS002
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            strata=[s[:n] for s in self._strata()],
        )
