class Qwen3VLForConditionalGeneration:
    def _get_deepstack_input_embeds(self, num_tokens):
        # As it was before #43617: no inputs while nothing is staged (D1).
        if not getattr(self, "deepstack_input_embeds_num_tokens", 0):
            return None
        ...
