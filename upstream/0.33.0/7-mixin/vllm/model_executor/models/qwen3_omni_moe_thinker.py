from .deepstack import DeepStackMixin


class Qwen3OmniMoeThinkerForConditionalGeneration(DeepStackMixin): ...
