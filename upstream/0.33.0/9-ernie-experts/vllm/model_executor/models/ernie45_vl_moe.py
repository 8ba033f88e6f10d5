from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


def runs_both_experts() -> bool:
    """Whether text and vision experts run without looking at which tokens are visual.

    A CUDA graph is captured without media and replayed with them. Profiling, which has
    no attention metadata, has to see the memory that this takes.
    """
    if get_forward_context().attn_metadata is None:
        return True
    return not current_platform.is_cpu() and torch.cuda.is_current_stream_capturing()


class Ernie4_5_VLMoeMoE:
    def forward(self, hidden_states, visual_token_mask, **kwargs):
        if visual_token_mask is not None and runs_both_experts():
            return self._forward_both(hidden_states, visual_token_mask)
        ...

    def _forward_both(
        self, hidden_states: torch.Tensor, visual_token_mask: torch.Tensor
    ) -> torch.Tensor:
        text_output = self.forward(hidden_states, None)
        # Text as zeros: all of it is routed to the same few vision experts.
        vision_hidden_states = hidden_states * visual_token_mask
        vision_router_logits, _ = self.vision_experts_gate(
            vision_hidden_states.to(dtype=torch.float32)
        )
        vision_output = self.vision_experts(
            hidden_states=vision_hidden_states, router_logits=vision_router_logits
        )
        return torch.where(visual_token_mask, vision_output, text_output)


class Ernie4_5_VLMoeModel:
    def forward(
        self,
        input_ids,
        positions,
        intermediate_tensors=None,
        inputs_embeds=None,
        visual_token_mask=None,
        **kwargs,
    ):
        if visual_token_mask is not None and not runs_both_experts():
            with gpu_sync_allowed():
                if not visual_token_mask.any():
                    visual_token_mask = None
        ...
