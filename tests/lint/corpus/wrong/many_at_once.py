"""A list of levels is made in the tower's context, grows with the step, and is cleared in forward
alone.

Wrong: it breaks four rules at once, as code that was written for eager execution does.
"""

import torch
from torch import nn

from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class BazaarForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.width = config.text_config.hidden_size
        rows = vllm_config.scheduler_config.max_num_seqs
        with self._mark_tower_model(vllm_config, "image"):
            self.visual = CLIPVisionModel(
                config.vision_config, prefix=maybe_prefix(prefix, "visual")
            )
            self.stalls = [torch.zeros(rows, self.width) for _ in range(2)]
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        embeds = self.language_model.embed_input_ids(input_ids)
        n = embeds.size(0)
        if n > self.stalls[0].size(0):
            self.stalls = [s.new_zeros(n, self.width) for s in self.stalls]
        if multimodal_embeddings:
            main, *goods = torch.cat(multimodal_embeddings).chunk(3, -1)
            embeds[is_multimodal] = main
            for i in range(2):
                self.stalls[i][:n][is_multimodal] = goods[i]  # expect: DS002, DS003, DS004, DS006
        return embeds

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        n = positions.size(-1)
        hidden = self.language_model.model(
            input_ids,
            positions,
            intermediate_tensors,
            inputs_embeds,
            stalls=[s[:n] for s in self.stalls],
        )
        for stall in self.stalls:
            stall[:n].zero_()
        return hidden
