"""Draws the weights of `--load-format dummy` while they are loaded: then a CPU's kernels pack them.

vLLM imports this module in its worker: `--worker-extension-cls tests.serving.drawn.Drawn`.
"""

from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from .unpinned import Unpinned
from .weights import draw_weights

DummyModelLoader.load_weights = lambda self, model, model_config: draw_weights(model)

# As released, Ernie 4.5-VL runs on GPUs alone: a CPU hands its positions one argument more.
rotate = Ernie4_5_VLRotaryEmbedding.forward_native
Ernie4_5_VLRotaryEmbedding.forward_cpu = lambda self, positions, query, key=None, offsets=None: (
    rotate(self, positions, query, key)
)


class Drawn(Unpinned):
    """As `Unpinned`."""
