"""One vLLM's DeepStack path, in a process of its own: started by `benchmarks.speed.deepstack`.

What a step does with DeepStack's features around the decoder: it splits the encoder's output
and stages the levels, reads them, and clears them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_deepstack.check.processes import vllm_name

from .workers import serve

DTYPE = torch.bfloat16
SLEEP_CYCLES = 8_000_000
"""What keeps the GPU busy while a step's kernels are launched: 4 ms at 2 GHz."""


def lay_out(tokens: int, share: float, image_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Lengths of a step's images, and its mask, `[tokens]`: text between images, evenly."""
    staged = max(1, round(tokens * share))
    count = -(-staged // image_tokens)
    lengths = [staged // count + (i < staged % count) for i in range(count)]
    mask = torch.zeros(tokens, dtype=torch.bool)
    position = 0
    for i, length in enumerate(lengths):
        position += (tokens - staged) * (i + 1) // count - (tokens - staged) * i // count
        mask[position : position + length] = True
        position += length
    return lengths, mask


def bare_model(rows: int, hidden: int, levels: int) -> Any:
    """vLLM's class with its buffers, and without weights."""
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

    model: Any = Model.__new__(Model)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=hidden))
    model.use_deepstack, model.deepstack_num_level = True, levels
    model.visual_dim, model.multiscale_dim = hidden, levels * hidden
    zeros = partial(torch.zeros, rows, hidden, device="cuda", dtype=DTYPE)
    model.deepstack_input_embeds = [zeros() for _ in range(levels)]
    model.deepstack_input_embeds_num_tokens = 0
    return model


def parts(model: Any, embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """A step's calls, as the model makes them; the first takes the encoder's output."""

    def stage(features: list[torch.Tensor]) -> None:
        if hasattr(model, "_stage_deepstack_input_embeds"):
            model._stage_deepstack_input_embeds(features, mask)
        else:
            payload, _ = model._compute_deepstack_embeds(embeds, features, mask)
            model._set_deepstack_input_embeds(payload)

    return {
        "split and stage": stage,
        "read": partial(model._get_deepstack_input_embeds, len(mask)),
        "clear": partial(model._clear_deepstack_input_embeds, len(mask)),
    }


class Staging:
    def device(self) -> dict[str, Any]:
        """The name of this vLLM, and the GPU's ceilings: what a floor is made of."""
        a = torch.randn(2**29, device="cuda")
        b = torch.empty_like(a)
        (seconds,) = self.timed([lambda: b.copy_(a)], 9)
        return {"vllm": vllm_name(), "copy_bytes_per_second": 2 * a.nbytes / seconds}

    def plain(self, nbytes: int, repeats: int) -> float:
        """Seconds of PyTorch's own `copy_` and `zero_` of as many contiguous bytes."""
        a = torch.randint(0, 99, (nbytes,), device="cuda", dtype=torch.uint8)
        b = torch.empty_like(a)
        (seconds,) = self.timed([lambda: (b.copy_(a), b.zero_())], repeats)
        return seconds

    def path(
        self,
        tokens: int,
        hidden: int,
        levels: int,
        share: float,
        image_tokens: int,
        repeats: int,
        seed: int,
    ) -> dict[str, Any]:
        lengths, mask = lay_out(tokens, share, image_tokens)
        model = bare_model(tokens, hidden, levels)
        embeds = torch.zeros(tokens, hidden, device="cuda", dtype=DTYPE)
        torch.manual_seed(seed)
        shape = sum(lengths), (1 + levels) * hidden
        encoded = [torch.randn(shape, device="cuda").to(DTYPE) for _ in range(2)]
        calls = parts(model, embeds, mask)
        turn = [0]

        def stage() -> None:
            turn[0] += 1
            calls["split and stage"](list(encoded[turn[0] % 2].split(lengths)))

        steps = [stage, calls["read"], calls["clear"]]
        (seconds,) = self.timed([lambda: [step() for step in steps]], repeats)
        parts_seconds = self.timed(steps, repeats)
        stage()
        self.check(calls["read"](), encoded[turn[0] % 2], mask, levels)
        calls["clear"]()
        moved = {}
        for name, step in zip(calls, steps):
            with Counter() as counter:
                step()
            moved[name] = {"bytes": counter.bytes, "launches": counter.launches}
        return {
            "seconds": seconds,
            "parts_seconds": dict(zip(calls, parts_seconds)),  # each with an event's cost
            "busy_seconds": self.busy(steps, max(3, repeats // 4)),
            "host_seconds": self.host(steps, repeats),
            "moved": moved,
        }

    def check(self, read: Any, encoded: torch.Tensor, mask: torch.Tensor, levels: int) -> None:
        """What is timed is right."""
        features = encoded.unflatten(1, (1 + levels, -1))
        for level, rows in enumerate(read.tensors.values()):
            if not rows[mask.cuda()].equal(features[:, 1 + level]) or rows[~mask.cuda()].any():
                raise AssertionError(f"level {level} is not what was staged")

    def timed(self, steps: list[Callable[[], Any]], repeats: int) -> list[float]:
        """Seconds of each step by CUDA events, the median of `repeats`, from cold caches."""
        scratch = torch.ones(2**28, device="cuda", dtype=torch.uint8)  # 256 MiB
        found = []
        for number in range(repeats + 3):
            scratch.max()  # fills the caches, and leaves nothing there to be written back
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
            torch.cuda._sleep(SLEEP_CYCLES)
            events[0].record()
            for step, event in zip(steps, events[1:]):
                step()
                event.record()
            torch.cuda.synchronize()
            if number >= 3:
                found.append([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)])
        return torch.tensor(found, dtype=torch.float64).median(0).values.tolist()

    def host(self, steps: list[Callable[[], Any]], repeats: int) -> float:
        """Seconds until the calls return, on a GPU that is idle; the median."""
        found = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for step in steps:
                step()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def busy(self, steps: list[Callable[[], Any]], repeats: int) -> float:
        """Seconds in which kernels and copies ran, a step: without the gaps between them."""
        from torch.profiler import ProfilerActivity, profile

        scratch = torch.ones(2**28, device="cuda", dtype=torch.uint8)
        total = 0.0
        for _ in range(repeats):
            scratch.max()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for step in steps:
                    step()
                torch.cuda.synchronize()
            events = [e for e in profiler.events() if e.device_type.name == "CUDA"]
            total += sum(event.device_time for event in events) / 1e6
        return total / repeats


class Counter(TorchDispatchMode):
    """Bytes that operations on the GPU read and write, from their arguments."""

    def __enter__(self) -> Counter:
        self.bytes, self.launches = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and (moved := self.moved(func.overloadpacket.__name__, args, out)):
            self.bytes += moved
            self.launches += 1
        return out

    def moved(self, name: str, args: Any, out: Any) -> int:
        target = args[0] if args and isinstance(args[0], torch.Tensor) else out
        if not (isinstance(out, torch.Tensor) and (target.is_cuda or out.is_cuda)):
            return 0
        if name in ("empty", "empty_like", "new_empty", "empty_strided"):
            return 0
        if name in ("zero_", "new_zeros", "zeros", "fill_"):
            return out.nbytes
        if name == "index_fill_":
            return args[2].nbytes + args[2].numel() * out.nbytes // out.size(args[1])
        if name == "index_copy_":
            return args[2].nbytes + 2 * args[3].nbytes
        if name in ("index_put_", "_index_put_impl_"):
            return sum(i.nbytes for i in args[1] if i is not None) + 2 * args[2].nbytes
        if name == "copy_":
            return args[1].nbytes + out.nbytes
        if name == "cat":
            return 2 * out.nbytes
        if name in ("clone", "_to_copy"):
            return target.nbytes + out.nbytes
        raise NotImplementedError(f"{name}: how many bytes does it move?")


if __name__ == "__main__":
    serve(sys.argv[1], Staging())
