"""forward zeroes the buffer unless a flag says that this step has staged, and then hands it on.

Wrong: graphs are captured while the flag is False, and replay the zeroing over what was just
staged.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class ChalkForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        width = vllm_config.model_config.get_hidden_size()
        self.register_buffer("board", torch.zeros(rows, width), persistent=False)
        self.fresh = False
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.board.zero_()
        self.fresh = True
        embeds = self.language_model.embed_input_ids(input_ids)
        if multimodal_embeddings:
            self.board[: len(embeds)][is_multimodal] = torch.cat(  # expect: DS007
                multimodal_embeddings
            )
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        if not self.fresh:
            self.board.zero_()
        self.fresh = False
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            board=self.board[: positions.size(-1)],
        )
