"""Routing hints by modality are in a dict of tensors on self.

Wrong: a dict is no module, so its tensors are not in named_buffers.
"""

import torch
from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

KINDS = ("speech", "music")


class JukeboxForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        cfg = vllm_config.model_config.hf_config
        self.tokens = {"speech": cfg.speech_token_id, "music": cfg.music_token_id}
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.hints = {kind: torch.zeros(rows, 1) for kind in KINDS}
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        for hint in self.hints.values():
            hint.zero_()
        n = input_ids.numel()
        for kind, token in self.tokens.items():
            self.hints[kind][:n].masked_fill_((input_ids == token)[:, None], 1.0)  # expect: DS004
        return self._embed_text_input_ids(
            input_ids, self.language_model.embed_input_ids, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        return self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            hints={kind: hint[:n] for kind, hint in self.hints.items()},
        )
