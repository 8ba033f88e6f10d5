# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5-VL: which tokens are visual is computed in `forward`, where graphs have it,
and later pipeline stages (D17); from the step's own tokens (D2)."""

from .ernie45_vl_moe import runs_both


class Ernie4_5_VLMoeForConditionalGeneration:
    requires_raw_input_tokens = True

    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        **kwargs,
    ):
        ids = self._visual_token_ids_tensor_cache
        if ids is not None and input_ids is not None:
            self._visual_token_ids_tensor_cache = ids.to(input_ids)  # once, in no graph
            self._set_visual_token_mask(input_ids)
            mask = self.visual_token_mask
            if runs_both(mask) or mask.any():
                kwargs["visual_token_mask"] = mask
        self.visual_token_mask = None
        ...
