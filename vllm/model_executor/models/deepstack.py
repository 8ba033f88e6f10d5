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
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled


class DeepStackMixin:
    """Stages one step's DeepStack features for the decoder.

    The model that mixes this in makes the buffers: `deepstack_input_embeds`, one a
    level, each `[rows, hidden_size]`, zeros. Its `embed_input_ids`, which runs at every
    step whatever graph follows, clears what an earlier step left and stages with
    `_stage_…`; its `forward` begins with `_move_…`, reads with `_get_…`, runs the
    decoder, and ends with `_clear_…`. Whatever the order of calls:

    - The decoder's inputs never change in kind: as long as there are buffers, reading
      gives a tensor for every level, zeros where nothing is staged. So a graph that was
      compiled while nothing was staged (in the profiling run) takes features later.
      Contract of vllm-project/vllm#43617; the defect is vllm-project/vllm#43602.
    - A row holds the payload last staged there, or zeros. Only the rows of a payload
      are ever written or cleared.
    - What reading gave shows what is staged later, too, for good: a CUDA graph that was
      captured with it goes on reading it. So buffers that are outgrown stay, copies of
      the others' first rows, and steps that fit them go on reading them.
    - Without a vision tower there are no buffers: reading gives `None`, all else does
      nothing. Buffers on the meta device are none: that is where vLLM puts what belongs
      to a tower it does not load (vllm-project/vllm#49384).
    """

    deepstack_input_embeds: Sequence[torch.Tensor] | torch.Tensor = ()
    """The buffers, by level; one tensor from the first use on."""

    deepstack_outgrown: Sequence[torch.Tensor] = ()
    """The buffers that were too small for some step, smallest first."""

    deepstack_input_embeds_num_tokens: int = 0
    """How many rows, from the first, may hold a payload. The rest are zeros."""

    deepstack_rows: torch.Tensor
    """The payload's rows, of those: int64, ascending."""

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
        if self._deepstack_buffers() is None:
            return None
        before = self.deepstack_rows_read[: dbo_current_ubatch_id()]
        self.deepstack_rows_read = [*before, num_tokens]
        start, end = sum(before), sum(before) + num_tokens
        self._resize_deepstack_input_embeds(end)
        by_size = [*self.deepstack_outgrown, self._deepstack_buffers()]
        smallest = next(buffers for buffers in by_size if buffers.size(1) >= end)
        return IntermediateTensors(
            {
                f"deepstack_input_embeds_{level}": buffer[start:end]
                for level, buffer in enumerate(smallest)
            }
        )

    def _stage_deepstack_input_embeds(
        self, multimodal_embeddings: Sequence[torch.Tensor], is_vision: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """Stages what the vision encoder gave for a step, in place of any payload.

        Embeddings `[tokens, (1 + levels) * hidden_size]` are its own: the decoder's
        input, followed by the levels. `is_vision`, `[num_tokens]`, says which of the
        step's tokens they are for, in order. Returns the embeddings without levels;
        those of another width, and all without buffers, are returned as they are.

        Raises:
            ValueError: there are more or fewer such tokens than embeddings.

        """
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        buffers = self._deepstack_buffers()
        if buffers is None:
            return multimodal_embeddings
        levels, _, hidden_size = buffers.shape
        rest, vision = [], []
        for embeds in multimodal_embeddings:
            if embeds.size(-1) == (1 + levels) * hidden_size:
                vision.append(embeds)
                embeds = embeds[:, :hidden_size]
                embeds.__dict__.update(vision[-1].__dict__)  # modality, from 0.32 on
            rest.append(embeds)
        if not any(map(len, vision)):
            return multimodal_embeddings
        features = [
            embeds.view(-1, 1 + levels, hidden_size)[:, 1:].transpose(0, 1)
            for embeds in join_neighbors(vision)
        ]
        self._write_deepstack_rows(features, is_vision.nonzero().flatten())
        return rest

    def _set_deepstack_input_embeds(self, deepstack_input_embeds: torch.Tensor) -> None:
        """Stages a payload, `[levels, num_tokens, hidden_size]`, in place of any other.

        It is copied, and converted to the buffers' dtype and device. The caller gives
        zeros for the rows of text.

        Raises:
            ValueError: the payload has not the buffers' levels and hidden size.

        """
        buffers = self._deepstack_buffers()
        if buffers is None:
            return
        levels, num_tokens, hidden_size = deepstack_input_embeds.shape
        expected = buffers.size(0), buffers.size(2)
        if (levels, hidden_size) != expected:
            raise ValueError(
                f"DeepStack payload of {levels} levels, hidden size {hidden_size}, "
                f"for buffers of {expected[0]} levels, hidden size {expected[1]}"
            )
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        self._write_deepstack_rows([deepstack_input_embeds], torch.arange(num_tokens))

    def _write_deepstack_rows(
        self, features: list[torch.Tensor], rows: torch.Tensor
    ) -> None:
        """Writes features, each `[levels, tokens, hidden_size]`, to rows, in order."""
        tokens = [part.size(1) for part in features]
        if sum(tokens) != len(rows):
            raise ValueError(
                f"DeepStack features of {' + '.join(map(str, tokens))} tokens "
                f"for {len(rows)} placeholders"
            )
        self.deepstack_input_embeds_num_tokens = int(rows[-1]) + 1 if len(rows) else 0
        self._resize_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        buffers = self._deepstack_buffers()
        assert buffers is not None
        if buffers.is_cuda and not rows.is_cuda and is_pin_memory_available():
            rows = rows.pin_memory()  # or the copy waits for all that the GPU has to do
        self.deepstack_rows = rows.to(buffers.device, non_blocking=True)
        words = in_words(buffers)
        for part, part_rows in zip(features, self.deepstack_rows.split(tokens)):
            source = in_words(part.to(buffers))
            target = words if source.dtype == words.dtype else buffers
            target.index_copy_(1, part_rows, source.view(target.dtype))
        self._copy_to_outgrown(buffers)

    def _clear_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Ends the payload of a step of `num_tokens`: its rows are zeros again.

        Rows past `num_tokens` stay staged. Costs nothing where nothing is staged. Does
        nothing while dual-batch overlap runs: the other micro-batch may still read.
        """
        buffers = self._deepstack_buffers()
        staged = self.deepstack_input_embeds_num_tokens
        if buffers is None or staged == 0 or dbo_enabled():
            return
        if num_tokens < staged:
            buffers[:, :num_tokens].zero_()
        else:
            rows = self.deepstack_rows.to(buffers.device)
            in_words(buffers).index_fill_(1, rows, 0)
            self.deepstack_input_embeds_num_tokens = 0
        self._copy_to_outgrown(buffers)

    def _resize_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Makes room for `num_tokens` rows. Keeps what is staged; never shrinks."""
        buffers = self._deepstack_buffers()
        assert buffers is not None
        rows = buffers.size(1)
        if num_tokens > rows:
            # At least twice the rows: so few are outgrown, whatever sizes there are.
            missing = max(num_tokens - rows, rows)
            self.deepstack_outgrown = [*self.deepstack_outgrown, buffers]
            self.deepstack_input_embeds = torch.nn.functional.pad(
                buffers, (0, 0, 0, missing)
            )

    def _move_deepstack_input_embeds(self, inputs_embeds: torch.Tensor | None) -> None:
        """Gives the buffers the device and dtype of the decoder's inputs.

        The first call, in the profiling run, copies them even if they have both: memory
        that a model took while it was loaded does not outlive `sleep(level=2)`.
        """
        buffers = self._deepstack_buffers()
        if inputs_embeds is None or buffers is None:
            return
        place = inputs_embeds.device, inputs_embeds.dtype
        if self.deepstack_moved_to != place:
            self.deepstack_outgrown = ()
            self.deepstack_input_embeds = buffers.to(*place, copy=True)
            self.deepstack_moved_to = place

    def _copy_to_outgrown(self, buffers: torch.Tensor) -> None:
        for smaller in self.deepstack_outgrown:
            smaller.copy_(buffers[:, : smaller.size(1)])

    def _deepstack_buffers(self) -> torch.Tensor | None:
        """All levels, `[levels, rows, hidden_size]`; `None` without a vision tower."""
        buffers = self.deepstack_input_embeds
        if len(buffers) == 0 or buffers[0].is_meta:
            return None
        if not isinstance(buffers, torch.Tensor):
            self.deepstack_input_embeds = buffers = torch.stack(tuple(buffers))
        return buffers


def join_neighbors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Concatenates by rows, without a copy, what follows one another in memory.

    Images that are encoded together are slices of one tensor.
    """
    joined = [tensors[0]]
    for tensor in tensors[1:]:
        last = joined[-1]
        rows, stride = len(last), last.stride()
        if (
            tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and tensor.stride() == stride
            and tensor.storage_offset() == last.storage_offset() + rows * stride[0]
        ):
            shape = rows + len(tensor), *last.shape[1:]
            joined[-1] = last.as_strided(shape, stride)
        else:
            joined.append(tensor)
    return joined


def in_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in words of 16 bytes; as it is, if rows do not divide into them.

    PyTorch indexes an element a thread: the larger the elements, the fewer the threads.
    Words double the speed of bfloat16 on an H200.
    """
    word = torch.complex128.itemsize // tensor.itemsize
    sizes = (tensor.size(-1), tensor.storage_offset(), *tensor.stride()[:-1])
    if (
        tensor.device.type in ("cpu", "cuda")
        and tensor.stride(-1) == 1
        and not any(size % word for size in sizes)
    ):
        return tensor.view(torch.complex128)
    return tensor
