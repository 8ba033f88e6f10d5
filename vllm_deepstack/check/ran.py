"""What an engine really runs: vLLM changes modes with a warning alone, or with none."""

from __future__ import annotations

import gc
from typing import Any

from .modes import BATCH_INVARIANT, BREAKABLE, EAGER, FULL, PIECEWISE, V1, V2, Mode


def ran(llm: Any) -> dict[str, Any]:
    """Asked of the first worker, and of the configuration as vLLM has made it."""
    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    sizes = compilation.cudagraph_capture_sizes or []
    return {
        "eager": bool(config.model_config.enforce_eager),
        "compilation": getattr(compilation.mode, "name", None) or str(compilation.mode),
        "backend": str(compilation.backend or "inductor"),
        "largest_graph": max(sizes, default=0),
        **llm.collective_rpc(of_worker)[0],
    }


def of_worker(worker: Any) -> dict[str, Any]:
    import torch

    import vllm.envs
    from vllm.compilation.counter import compilation_counter

    compilation = worker.vllm_config.compilation_config
    layers = compilation.static_forward_context.values()
    backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    second = any(
        c.__module__.startswith("vllm.v1.worker.gpu.") for c in type(worker.model_runner).__mro__
    )
    return {
        "runner": "V2" if second else "V1",
        "attention": sorted(backends),
        "compiled": compilation_counter.num_models_seen
        + compilation_counter.stock_torch_compile_count,
        # Of the type: asking a dead proxy for its class raises.
        "graphs": sum(issubclass(type(each), torch.cuda.CUDAGraph) for each in gc.get_objects()),
        # The worker's own, which its model runner may have changed.
        "cudagraphs": getattr(compilation.cudagraph_mode, "name", None) or "NONE",
        "breakable": bool(getattr(vllm.envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False)),
        "batch_invariant": bool(getattr(vllm.envs, "VLLM_BATCH_INVARIANT", False)),
    }


def instead(mode: Mode, found: dict[str, Any]) -> str:
    """Why this is not the mode that was asked for; nothing if it is."""
    if found["eager"] != (mode == EAGER):
        return f"vLLM runs with enforce_eager={found['eager']}"
    if mode == EAGER:
        return ""
    if mode in (PIECEWISE, FULL) and found["cudagraphs"] != mode.name.upper():
        return f"vLLM runs with cudagraph_mode {found['cudagraphs']} instead"
    if mode in (V1, V2) and found["runner"] != mode.name:
        return f"vLLM runs Model Runner {found['runner']} instead"
    if mode in (PIECEWISE, FULL, BREAKABLE) and not found["graphs"]:
        return "vLLM has captured no graph"
    if mode == BREAKABLE and not found["breakable"]:
        return "vLLM has switched breakable graphs off"
    if mode == BATCH_INVARIANT and not found["batch_invariant"]:
        return "vLLM has switched its batch-invariant mode off"
    if not found["compiled"] and not found["graphs"]:
        return (
            f"nothing was compiled or captured: vLLM runs with compilation mode "
            f"{found['compilation']} and cudagraph_mode {found['cudagraphs']}, as eager does"
        )
    return ""


def described(found: dict[str, Any]) -> str:
    """For people."""
    parts = ["Python"] if found["eager"] else []
    if "replayed" in found:
        parts = [f"{found['replayed']} steps replayed"]
    if found["compiled"]:
        parts.append(f"{found['compilation']} with {found['backend']}")
    if found["graphs"]:
        kind = "breakable graphs" if found["breakable"] else f"{found['cudagraphs']} graphs"
        parts.append(f"{found['graphs']} {kind} of up to {found['largest_graph']} tokens")
    parts.append(f"Model Runner {found['runner']}")
    return ", ".join([*parts, *found["attention"]])
