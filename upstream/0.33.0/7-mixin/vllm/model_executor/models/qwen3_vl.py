from .deepstack import DeepStackMixin


class Qwen3VLForConditionalGeneration(DeepStackMixin): ...
