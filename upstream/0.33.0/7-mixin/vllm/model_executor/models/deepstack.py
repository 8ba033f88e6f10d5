import torch

from vllm.sequence import IntermediateTensors


class DeepStackMixin:
    """Buffers in which one step's DeepStack features wait for the decoder.

    A model sets `deepstack_input_embeds` to one buffer per level, of
    `max_num_batched_tokens` rows. Without a vision tower it sets none.
    """

    deepstack_input_embeds: list[torch.Tensor] | None = None
    # Rows, from the first, that may hold features. The others are zeros.
    deepstack_input_embeds_num_tokens: int = 0

    def _get_deepstack_input_embeds(
        self, num_tokens: int
    ) -> IntermediateTensors | None:
        if not self.deepstack_input_embeds:
            return None
        self._resize_deepstack_input_embeds(num_tokens)
        return IntermediateTensors(
            {
                f"deepstack_input_embeds_{idx}": buffer[:num_tokens]
                for idx, buffer in enumerate(self.deepstack_input_embeds)
            }
        )

    def _resize_deepstack_input_embeds(self, num_tokens: int) -> None:
        buffers = self.deepstack_input_embeds
        if buffers and num_tokens > buffers[0].size(0):
            self.deepstack_input_embeds = [
                buffer.new_zeros(num_tokens, buffer.size(1)) for buffer in buffers
            ]

    def _set_deepstack_input_embeds(self, deepstack_input_embeds: torch.Tensor) -> None:
        if not self.deepstack_input_embeds:
            return
        num_tokens = deepstack_input_embeds.size(1)
        self._resize_deepstack_input_embeds(num_tokens)
        for buffer, features in zip(
            self.deepstack_input_embeds, deepstack_input_embeds
        ):
            buffer[:num_tokens].copy_(features)
        self.deepstack_input_embeds_num_tokens = num_tokens

    def _clear_deepstack_input_embeds(self, num_tokens: int) -> None:
        if not self.deepstack_input_embeds or num_tokens == 0:
            return
        for buffer in self.deepstack_input_embeds:
            buffer[:num_tokens].zero_()
        self.deepstack_input_embeds_num_tokens = 0
