class Granite4VisionLLMForCausalLM:
    def make_empty_intermediate_tensors(self, batch_size, dtype, device):
        ...
        for llm_layer in getattr(self, "_ds_layer_indices", []):
            # The ranks before have used it.
            if llm_layer < self.model.start_layer:
                continue
            ...
        ...


class Granite4VisionForConditionalGeneration:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        if not vllm_config.model_config.supports_multimodal_inputs:
            # The first rank sends no features.
            self._ds_layer_indices = []

        self.language_model._ds_layer_indices = self._ds_layer_indices  # anchor
        ...
