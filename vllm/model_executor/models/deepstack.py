# SPDX-License-Identifier: Apache-2.0
"""DeepStack's staging buffers: the one place where features wait for the decoder.

DeepStack adds features of several vision-encoder layers (levels) to the hidden states
of the first decoder layers (https://arxiv.org/abs/2406.04334).
"""

from collections.abc import Iterator, Sequence

import torch

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils import random_uuid
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_enabled

from .utils import StageMissingLayer, _merge_multimodal_embeddings


def check_embedding_widths(vision_config, hf_inputs) -> None:
    """Raises ValueError unless a request's embeddings have the tower's width (D15)."""
    levels = len(getattr(vision_config, "deepstack_visual_indexes", None) or ())
    names = {"image_embeds", "video_embeds"} & hf_inputs.keys() if levels else ()
    for name in names:
        embeds, width = hf_inputs[name], (1 + levels) * vision_config.out_hidden_size
        for item in [embeds] if hasattr(embeds, "shape") else embeds:
            if item.shape[-1] != width:
                raise ValueError(
                    f"`{name}` are {item.shape[-1]} wide; the model takes {width}: the "
                    f"decoder's input and {levels} DeepStack levels, side by side"
                )


def rows_with_levels(size: int, embeddings: Sequence[torch.Tensor], is_multimodal):
    """The rows of embeddings that are wider than `size`: not of `prompt_embeds`."""
    sizes = torch.tensor([e.size() for e in embeddings])
    wide = (sizes[:, 1] > size).repeat_interleave(sizes[:, 0]).to(is_multimodal)
    return is_multimodal.masked_scatter(is_multimodal, wide)


class DeepStackMixin(torch.nn.Module):
    """`embed_input_ids` runs in Python at every step, whatever graph follows: it clears
    what an earlier step left, then stages. `forward`, upstream's own, reads and clears.

    - Reading gives the same tensors at every step, zeros where nothing is staged: a
      decoder compiled or captured without features sees them later (D1, #43617).
    - A row holds the payload staged last, or zeros (D2).
    - There is a row for every token that a step can schedule, which both model runners
      assert: buffers never grow, and no captured graph is left with outgrown ones.
    """

    deepstack_input_embeds_num_tokens: int = 0
    """How many rows, from the first, may hold a payload. The rest are zeros."""
    _deepstack_buffers: list[torch.Tensor] = []
    _deepstack_rows_read: int = 0
    _use_deepstack: bool = False
    _is_ec_consumer: bool = False

    @property
    def deepstack_input_embeds(self) -> list[torch.Tensor]:
        """`[max_num_batched_tokens, hidden_size]` by level; empty until set."""
        return self._deepstack_buffers

    @deepstack_input_embeds.setter
    def deepstack_input_embeds(self, buffers: Sequence[torch.Tensor] | None) -> None:
        """`None`, which upstream sets in places, leaves those that are there."""
        device = current_platform.device_type
        if buffers:
            self._deepstack_buffers = [
                torch.zeros_like(b, device=device) if b.is_meta else b for b in buffers
            ]

    def named_buffers(self, *args, **kwargs) -> Iterator[tuple[str, torch.Tensor]]:
        """`sleep(level=2)` keeps what is listed (D7). Not registered: `reload_weights`
        would miss them in a checkpoint. Unique: `weight_cache` shares equal names."""
        yield from torch.nn.Module.named_buffers(self, *args, **kwargs)
        key = self.__dict__.setdefault("_deepstack_key", random_uuid())
        for level, buffer in enumerate(self._deepstack_buffers):
            yield f"deepstack_input_embeds_{level}_{key}", buffer

    @property
    def use_deepstack(self) -> bool:
        """Whether the model has levels. If its encoder is not loaded (limits of 0),
        whether requests can send embeddings that have them."""
        if not isinstance(getattr(self, "visual", None), StageMissingLayer):
            return self._use_deepstack
        mm, vision = self.multimodal_config, self.config.vision_config
        text_only = mm.language_model_only and not self._is_ec_consumer
        if text_only and getattr(mm, "allow_missing_mm_embeddings", False):
            return False  # a KV consumer: 0.30 to 0.32 let it be sent embeddings
        levels = getattr(vision, "deepstack_visual_indexes", None)
        return mm.enable_mm_embeds and bool(levels)

    @use_deepstack.setter
    def use_deepstack(self, value: bool) -> None:
        """Each `__init__` sets it. That adds the limits to the compiled decoders' key,
        which lacks them up to 0.32. What the release compiled is not loaded (D20)."""
        self._use_deepstack = value
        config = get_current_vllm_config_or_none()
        ec = getattr(config, "ec_transfer_config", None)
        self._is_ec_consumer = ec is not None and ec.is_ec_consumer
        mm = getattr(getattr(config, "model_config", None), "multimodal_config", None)
        if mm is not None and isinstance(config.additional_config, dict):
            key = repr((mm.limit_per_prompt, mm.enable_mm_embeds))
            config.additional_config["deepstack"] = key

    def _get_deepstack_input_embeds(self, num_tokens: int):
        """Views `[num_tokens, hidden_size]`, by level; `None` without buffers."""
        if not self._deepstack_buffers:
            return None
        start = 0
        if dbo_enabled():  # D9: micro-batches start in order, each with its own rows
            start = self._deepstack_rows_read if dbo_current_ubatch_id() else 0
            self._deepstack_rows_read = start + num_tokens
        views = [b[start : start + num_tokens] for b in self._deepstack_buffers]
        names = (f"deepstack_input_embeds_{level}" for level in range(len(views)))
        return IntermediateTensors(dict(zip(names, views)))

    def _set_deepstack_input_embeds(self, deepstack_input_embeds: torch.Tensor) -> None:
        """Stages a payload, `[levels, num_tokens, hidden_size]`, in another's place."""
        self._clear_deepstack_input_embeds(self.deepstack_input_embeds_num_tokens)
        num_tokens = deepstack_input_embeds.size(1)
        for buffer, level in zip(self._deepstack_buffers, deepstack_input_embeds):
            buffer[:num_tokens] = level
        self.deepstack_input_embeds_num_tokens = num_tokens

    def _clear_deepstack_input_embeds(self, num_tokens: int) -> None:
        """Zeros the first `num_tokens` rows of what is staged. Not while Dynamo traces
        `forward`, or while another micro-batch may still read: then the next step's
        `embed_input_ids` does."""
        if torch.compiler.is_compiling() or dbo_enabled():
            return
        staged = self.deepstack_input_embeds_num_tokens
        if staged > 0:
            for buffer in self._deepstack_buffers:
                buffer[: min(num_tokens, staged)].zero_()
        if num_tokens >= staged:
            self.deepstack_input_embeds_num_tokens = 0

    def _recompute_media_positions(self, input_ids, embeddings, *args):
        """`recompute_mrope_positions` of a step that has `prompt_embeds`; else `None`.
        These are text: there are no positions beside them to be taken off (D18)."""
        size = self.config.text_config.hidden_size
        media = [e for e in embeddings if e.size(1) != size]
        if len(media) == len(embeddings):
            return None
        found, *others = self.recompute_mrope_positions(input_ids, media, *args)
        found = iter(found)
        return [e if e.size(1) == size else next(found) for e in embeddings], *others

    def _compute_deepstack_embeds(
        self, inputs_embeds, multimodal_embeddings, is_multimodal
    ):
        """Splits embeddings, `[tokens, (1 + levels) * hidden_size]`: the levels as a
        payload, if there are any, and the decoder's inputs. `prompt_embeds` come among
        them, `[tokens, hidden_size]` (D14)."""
        num_tokens, size = inputs_embeds.shape
        levels = [e[:, size:] for e in multimodal_embeddings if e.size(1) > size]
        if not levels:
            return None, multimodal_embeddings
        if len(levels) < len(multimodal_embeddings):
            is_multimodal = rows_with_levels(size, multimodal_embeddings, is_multimodal)
        payload = inputs_embeds.new_zeros(num_tokens, self.deepstack_num_level * size)
        payload = _merge_multimodal_embeddings(payload, levels, is_multimodal)
        payload = payload.view(num_tokens, -1, size).transpose(0, 1)
        return payload, [e[:, :size] for e in multimodal_embeddings]
