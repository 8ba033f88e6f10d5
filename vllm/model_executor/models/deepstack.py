# SPDX-License-Identifier: Apache-2.0
"""DeepStack's staging buffers: the one place where features wait for the decoder.

DeepStack adds features of several vision-encoder layers (levels) to the hidden states
of the first decoder layers (https://arxiv.org/abs/2406.04334). They are known when a
step's tokens are embedded, and used while the decoder runs.
"""

from collections.abc import Sequence

import torch

from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils import random_uuid
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled

from .utils import StageMissingLayer, _merge_multimodal_embeddings


class DeepStackMixin(torch.nn.Module):
    """Stages one step's DeepStack features for the decoder.

    `embed_input_ids` runs in Python at every step, whatever graph follows: it clears
    what an earlier step left, then stages. `forward`, upstream's own, reads the views,
    runs the decoder and clears.

    - Reading gives the same tensors at every step, zeros where nothing is staged: a
      decoder compiled or captured without features sees them later (D1, #43617).
    - A row holds the payload staged last, or zeros (D2).
    - There is a row for every token that a step can schedule, and both model runners
      assert that no step has more: no captured graph is left with outgrown buffers.
    """

    deepstack_input_embeds_num_tokens: int = 0
    """How many rows, from the first, may hold a payload. The rest are zeros."""
    _deepstack_names: tuple[str, ...] = ()
    _deepstack_rows_read: int = 0
    _use_deepstack: bool = False

    @property
    def deepstack_input_embeds(self) -> list[torch.Tensor]:
        """`[max_num_batched_tokens, hidden_size]` by level; empty until set."""
        return [getattr(self, name) for name in self._deepstack_names]

    @deepstack_input_embeds.setter
    def deepstack_input_embeds(self, buffers: Sequence[torch.Tensor] | None) -> None:
        """Registers them, so that `sleep(level=2)` keeps what they hold (D7).

        `None`, which upstream sets in places, leaves those that are there.
        """
        for level, buffer in enumerate(buffers or ()):
            if level == len(self._deepstack_names):
                # Unique: `model_loader/weight_cache` shares buffers of equal names
                # between engines.
                name = f"deepstack_input_embeds_{level}_{random_uuid()}"
                self._deepstack_names = (*self._deepstack_names, name)
            if buffer.is_meta:
                buffer = torch.zeros_like(buffer, device=current_platform.device_type)
            self.register_buffer(self._deepstack_names[level], buffer, persistent=False)

    @property
    def use_deepstack(self) -> bool:
        """Whether the model has levels. If its encoder is not loaded (limits of 0),
        whether requests can send embeddings that have them."""
        if isinstance(getattr(self, "visual", None), StageMissingLayer):
            levels = getattr(self.config.vision_config, "deepstack_visual_indexes", ())
            return self.multimodal_config.enable_mm_embeds and len(levels) > 0
        return self._use_deepstack

    @use_deepstack.setter
    def use_deepstack(self, value: bool) -> None:
        self._use_deepstack = value

    def _get_deepstack_input_embeds(
        self, num_tokens: int
    ) -> IntermediateTensors | None:
        """Views `[num_tokens, hidden_size]`, by level; `None` without buffers."""
        if not self.deepstack_input_embeds:
            return None
        start = 0
        if dbo_enabled():  # D9: micro-batches start in order, each with its own rows
            start = self._deepstack_rows_read if dbo_current_ubatch_id() else 0
            self._deepstack_rows_read = start + num_tokens
        self._resize_deepstack_input_embeds(start + num_tokens)
        return IntermediateTensors(
            {
                f"deepstack_input_embeds_{level}": buffer[start : start + num_tokens]
                for level, buffer in enumerate(self.deepstack_input_embeds)
            }
        )

    def _resize_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` rows. Keeps what is staged; never shrinks."""
        missing = num_tokens - self.deepstack_input_embeds[0].size(0)
        if missing > 0:
            pad, buffers = torch.nn.functional.pad, self.deepstack_input_embeds
            self.deepstack_input_embeds = [pad(b, (0, 0, 0, missing)) for b in buffers]

    def _set_deepstack_input_embeds(self, deepstack_input_embeds: torch.Tensor) -> None:
        """Stages a payload, `[levels, num_tokens, hidden_size]`, in place of any other.

        Raises ValueError if its levels or hidden size are not the buffers'.
        """
        if not (buffers := self.deepstack_input_embeds):
            return
        levels, num_tokens, hidden_size = deepstack_input_embeds.shape
        if (levels, hidden_size) != (len(buffers), buffers[0].size(1)):
            raise ValueError(
                f"DeepStack payload of {levels} levels, hidden size {hidden_size}, for "
                f"buffers of {len(buffers)} levels, hidden size {buffers[0].size(1)}"
            )
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        self._resize_deepstack_input_embeds(num_tokens)
        for buffer, level in zip(self.deepstack_input_embeds, deepstack_input_embeds):
            buffer[:num_tokens] = level
        self.deepstack_input_embeds_num_tokens = num_tokens

    def _clear_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Zeros the first `num_tokens` rows of what is staged.

        `forward` gives its own number of tokens; `embed_input_ids` all that are staged.
        """
        # `forward` must not clear while Dynamo traces it, or while another micro-batch
        # may still read. `embed_input_ids` runs outside of both, at the next step.
        if torch.compiler.is_compiling() or dbo_enabled():
            return
        staged = self.deepstack_input_embeds_num_tokens
        if staged > 0:
            for buffer in self.deepstack_input_embeds:
                buffer[: min(num_tokens, staged)].zero_()
        if num_tokens >= staged:
            self.deepstack_input_embeds_num_tokens = 0

    def _compute_deepstack_embeds(
        self,
        inputs_embeds: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        is_multimodal: torch.Tensor,
    ) -> tuple[torch.Tensor | None, Sequence[torch.Tensor]]:
        """Splits embeddings, `[tokens, (1 + levels) * hidden_size]`.

        Returns the levels as a payload, if there are any, and the decoder's inputs.
        `prompt_embeds` come among the embeddings, `[tokens, hidden_size]` (D14).
        """
        num_tokens, size = inputs_embeds.shape
        levels = [e[:, size:] for e in multimodal_embeddings if e.size(1) > size]
        if not levels:
            return None, multimodal_embeddings
        if len(levels) < len(multimodal_embeddings):  # leave out tokens without levels
            sizes = torch.tensor([e.size() for e in multimodal_embeddings])
            wide = (sizes[:, 1] > size).repeat_interleave(sizes[:, 0]).to(is_multimodal)
            is_multimodal = is_multimodal.masked_scatter(is_multimodal, wide)
        payload = inputs_embeds.new_zeros(num_tokens, self.deepstack_num_level * size)
        payload = _merge_multimodal_embeddings(payload, levels, is_multimodal)
        payload = payload.view(num_tokens, -1, size).transpose(0, 1)
        return payload, [e[:, :size] for e in multimodal_embeddings]
