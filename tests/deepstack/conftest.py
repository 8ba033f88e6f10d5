"""What every test of a model class needs of vLLM."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """vLLM's parallel groups, of this process alone: `forward` asks them for its stage."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    init = f"file://{tmp_path_factory.mktemp('group') / 'init'}"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, init, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        yield
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
