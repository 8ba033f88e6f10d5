# SPDX-License-Identifier: Apache-2.0
"""What vllm-project/vllm#43617 changes, and no more: what the fork's tests have to fail on.

As released in vLLM 0.23.0: reading gives zeros where nothing is staged, and growing makes
new buffers of zeros. The rest is as it was before.
"""

from vllm.sequence import IntermediateTensors


class PullRequest43617:
    def _get_deepstack_input_embeds(self, num_tokens):
        if not getattr(self, "deepstack_input_embeds", None):
            return None
        if num_tokens > self.deepstack_input_embeds[0].size(0):
            self._resize_deepstack_input_embeds(num_tokens)
        return IntermediateTensors(
            {
                f"deepstack_input_embeds_{level}": buffer[:num_tokens]
                for level, buffer in enumerate(self.deepstack_input_embeds)
            }
        )

    def _set_deepstack_input_embeds(self, deepstack_input_embeds):
        if not getattr(self, "deepstack_input_embeds", None):
            return
        num_tokens = deepstack_input_embeds.size(1)
        if num_tokens > self.deepstack_input_embeds[0].size(0):
            self._resize_deepstack_input_embeds(num_tokens)
        for buffer, level in zip(self.deepstack_input_embeds, deepstack_input_embeds):
            buffer[:num_tokens].copy_(level)
        self.deepstack_input_embeds_num_tokens = num_tokens

    def _resize_deepstack_input_embeds(self, num_tokens):
        self.deepstack_input_embeds = [
            buffer.new_zeros(num_tokens, buffer.size(1)) for buffer in self.deepstack_input_embeds
        ]
