"""Prints which Qwen3-VL a Ray worker of vLLM's imports: `python -m tests.overlay.ray_worker MODEL`.

The worker is vLLM's own, and as far as Ray's executor brings it without a GPU.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def imported(worker: Any) -> str:
    name = "vllm.model_executor.models.qwen3_vl"
    return f"{type(worker.worker).__name__} {importlib.import_module(name).__file__}"


def main(model: str) -> None:
    import cloudpickle
    import ray

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.ray_utils import RayWorkerWrapper

    # Of a CPU's memory, too.
    args = EngineArgs(model, max_model_len=512, dtype="float32", gpu_memory_utilization=0.3)
    config = args.create_engine_config()
    ray.init(num_cpus=1, include_dashboard=False)
    worker = ray.remote(num_cpus=1)(RayWorkerWrapper).remote(rpc_rank=0)
    kwargs = {"vllm_config": config, "local_rank": 0, "rank": 0, "is_driver_worker": True}
    kwargs["distributed_init_method"] = "tcp://127.0.0.1:0"  # nobody connects
    ray.get(worker.execute_method.remote("init_worker", [kwargs]))
    print(ray.get(worker.execute_method.remote(cloudpickle.dumps(imported))))


if __name__ == "__main__":
    main(sys.argv[1])
