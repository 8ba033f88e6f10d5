"""Draws the weights of `--load-format dummy` while they are loaded: then a CPU's kernels pack them.

vLLM imports this module in its worker: `--worker-extension-cls tests.serving.drawn.Drawn`.
"""

from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from .unpinned import Unpinned
from .weights import draw_weights

DummyModelLoader.load_weights = lambda self, model, model_config: draw_weights(model)


class Drawn(Unpinned):
    """As `Unpinned`."""
