# SPDX-License-Identifier: Apache-2.0
"""DeepStack's staging buffers: the one place where features wait for the decoder.

DeepStack adds features of several vision-encoder layers (levels) to the hidden states
that leave the first decoder layers (https://arxiv.org/abs/2406.04334). They are known
when a step's tokens are embedded and used while the decoder runs, so they are staged
between the two, in buffers that stay where they are from step to step: what
`torch.compile` and CUDA graphs ask of a model's inputs.
"""

from collections.abc import Sequence

import torch

from vllm.sequence import IntermediateTensors
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled


class DeepStackMixin:
    """Stages one step's DeepStack features for the decoder.

    The model that mixes this in makes the buffers: `deepstack_input_embeds`, one a
    level, each `[rows, hidden_size]`, zeros. Its `embed_input_ids`, which runs at every
    step whatever graph follows, clears what an earlier step left and stages with
    `_set_…`; its `forward` begins with `_move_…`, reads with `_get_…`, runs the
    decoder, and ends with `_clear_…`. Whatever the order of calls:

    - The decoder's inputs never change in kind: as long as there are buffers, reading
      gives a tensor for every level, zeros where nothing is staged. So a graph that was
      compiled while nothing was staged (in the profiling run) takes features later.
      Contract of vllm-project/vllm#43617; the defect is vllm-project/vllm#43602.
    - A row holds the payload last staged there, or zeros.
    - What reading gave shows what is staged later, too, for good: a CUDA graph that was
      captured with it goes on reading it. So buffers that are outgrown stay, staged to
      as the others are, and steps that fit them go on reading them.
    - Without a vision tower there are no buffers: reading gives `None`, all else does
      nothing. Buffers on the meta device are none: that is where vLLM puts what belongs
      to a tower it does not load (vllm-project/vllm#49384).
    """

    deepstack_input_embeds: Sequence[torch.Tensor] = ()
    """The buffers, by level."""

    deepstack_outgrown: Sequence[Sequence[torch.Tensor]] = ()
    """The buffers that were too small for some step, smallest first."""

    deepstack_input_embeds_num_tokens: int = 0
    """How many rows, from the first, may hold a payload. The rest are zeros."""

    deepstack_moved_to: tuple[torch.device, torch.dtype] | None = None
    """Where `_move_…` put the buffers."""

    deepstack_rows_read: Sequence[int] = ()
    """How many rows each micro-batch of the present step has read."""

    def _get_deepstack_input_embeds(
        self, num_tokens: int
    ) -> IntermediateTensors | None:
        """Reads what the decoder adds in a step of `num_tokens` (padding included).

        Returns `deepstack_input_embeds_0`, `…_1`, …: by level a view `[num_tokens,
        hidden_size]` of a buffer, of its dtype and on its device. `None` without a
        vision tower. Under dual-batch overlap, which runs `forward` on slices of the
        batch and begins them in order, each gets its own rows.
        """
        if not self._has_deepstack_buffers():
            return None
        before = self.deepstack_rows_read[: dbo_current_ubatch_id()]
        self.deepstack_rows_read = [*before, num_tokens]
        start, end = sum(before), sum(before) + num_tokens
        self._resize_deepstack_input_embeds(end)
        smallest = next(b for b in self._deepstack_buffers() if b[0].size(0) >= end)
        return IntermediateTensors(
            {
                f"deepstack_input_embeds_{level}": buffer[start:end]
                for level, buffer in enumerate(smallest)
            }
        )

    def _set_deepstack_input_embeds(self, deepstack_input_embeds: torch.Tensor) -> None:
        """Stages a payload, `[levels, num_tokens, hidden_size]`, in place of any other.

        It is copied, and converted to the buffers' dtype and device. The caller gives
        zeros for the rows of text.

        Raises:
            ValueError: the payload has not the buffers' levels and hidden size.
        """
        if not self._has_deepstack_buffers():
            return
        levels, num_tokens, hidden_size = deepstack_input_embeds.shape
        expected = (
            len(self.deepstack_input_embeds),
            self.deepstack_input_embeds[0].size(1),
        )
        if (levels, hidden_size) != expected:
            raise ValueError(
                f"DeepStack payload of {levels} levels, hidden size {hidden_size}, "
                f"for buffers of {expected[0]} levels, hidden size {expected[1]}"
            )
        self._resize_deepstack_input_embeds(num_tokens)
        for buffers in self._deepstack_buffers():
            for buffer, level in zip(buffers, deepstack_input_embeds):
                buffer[:num_tokens].copy_(level[: buffer.size(0)])
                buffer[num_tokens : self.deepstack_input_embeds_num_tokens].zero_()
        self.deepstack_input_embeds_num_tokens = num_tokens

    def _clear_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Ends the payload of a step of `num_tokens`: its rows are zeros again.

        Rows past `num_tokens` stay staged. Costs nothing where nothing is staged. Does
        nothing while dual-batch overlap runs: the other micro-batch may still read.
        """
        staged = self.deepstack_input_embeds_num_tokens
        if staged == 0 or dbo_enabled():
            return
        for buffers in self._deepstack_buffers():
            for buffer in buffers:
                buffer[: min(num_tokens, staged)].zero_()
        if num_tokens >= staged:
            self.deepstack_input_embeds_num_tokens = 0

    def _resize_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` rows. Keeps what is staged; never shrinks."""
        rows = self.deepstack_input_embeds[0].size(0)
        if num_tokens > rows:
            # At least twice the rows: so few are outgrown, whatever sizes there are.
            missing = max(num_tokens - rows, rows)
            self.deepstack_outgrown = self._deepstack_buffers()
            self.deepstack_input_embeds = [
                torch.nn.functional.pad(buffer, (0, 0, 0, missing))
                for buffer in self.deepstack_input_embeds
            ]

    def _move_deepstack_input_embeds(self, inputs_embeds: torch.Tensor | None) -> None:
        """Gives the buffers the device and dtype of the decoder's inputs.

        The first call, in the profiling run, copies them even if they have both: memory
        that a model took while it was loaded does not outlive `sleep(level=2)`.
        """
        if inputs_embeds is None or not self._has_deepstack_buffers():
            return
        place = inputs_embeds.device, inputs_embeds.dtype
        if self.deepstack_moved_to != place:
            self.deepstack_outgrown = ()
            self.deepstack_input_embeds = [
                buffer.to(*place, copy=True) for buffer in self.deepstack_input_embeds
            ]
            self.deepstack_moved_to = place

    def _deepstack_buffers(self) -> list[Sequence[torch.Tensor]]:
        """All buffers, by size and level."""
        return [*self.deepstack_outgrown, self.deepstack_input_embeds]

    def _has_deepstack_buffers(self) -> bool:
        buffers = self.deepstack_input_embeds
        return len(buffers) > 0 and not buffers[0].is_meta
