"""Omni's audio tower on a machine without a GPU.

It pins memory, for which a CUDA build of PyTorch wants a driver. vLLM imports this module in
its worker processes: `--worker-extension-cls tests.serving.unpinned.Unpinned`.
"""

from inspect import signature

from vllm.utils import torch_utils
from vllm_deepstack.check.replay import Replay

torch_utils.PIN_MEMORY = False
if "pin_memory" in signature(torch_utils.async_tensor_h2d).parameters:
    torch_utils.async_tensor_h2d.__defaults__ = (False,)


class Unpinned(Replay):
    """Adds what replays."""
