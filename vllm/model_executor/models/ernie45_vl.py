# SPDX-License-Identifier: Apache-2.0
"""Ernie 4.5-VL: which tokens are visual is computed in `forward`, where graphs record it
and later pipeline stages have it (D17); and from the step's own tokens (D2)."""

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
            # Moved once: not in each step, and in no graph.
            self._visual_token_ids_tensor_cache = ids.to(input_ids)
            self._set_visual_token_mask(input_ids)
            mask = self.visual_token_mask
            kwargs["visual_token_mask"] = (
                mask if runs_both(mask) or mask.any() else None
            )
        self.visual_token_mask = None
        ...
