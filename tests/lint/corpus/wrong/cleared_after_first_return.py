"""The prompt residuals are zeroed, but below the early return of a step without media.

Wrong: a text-only step returns before the zeroing and leaves the residuals of the last image.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class ResidualPromptVL(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__()
        dim = vllm_config.model_config.get_hidden_size()
        cap = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("prompt_residual", torch.zeros(cap, dim), persistent=False)
        self.text_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "text_model")
        )

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.text_model.embed_input_ids(input_ids)
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return hidden
        self.prompt_residual.zero_()
        main, residual = torch.cat(multimodal_embeddings).chunk(2, dim=-1)
        hidden[is_multimodal] = main
        self.prompt_residual[: hidden.size(0)][is_multimodal] = residual  # expect: DS002
        return hidden

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        rows = positions.shape[-1]
        return self.text_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            prompt_residual=self.prompt_residual[:rows],
        )
