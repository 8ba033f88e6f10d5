from .deepstack import DeepStackMixin


class CohereCompassForConditionalGeneration(DeepStackMixin): ...
