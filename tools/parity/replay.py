"""What a replayed CUDA graph does, on a CPU engine: `--worker-extension-cls …replay.Replay`.

vLLM captures the model's outer `forward` at some sizes, while nothing is staged. A replay runs the
kernels again, on the same memory, and none of the Python. Here a recording has PyTorch's operations
in place of kernels:

    forward        y = x[:4]; y = norm(y, w); self.count = 0; return y + buffer[:4]
    recorded       0 = slice(x, 4); 1 = norm(0, w); 2 = slice(buffer, 4); 3 = add(1, 2); return 3
    kept           x, w, buffer: the tensors that no recorded operation made
    not recorded   self.count = 0

Attention's operations read the step's metadata when they run, as they do in breakable graphs. What
is between two operations' uses is freed, so that a replay takes as much memory as a forward, which
vLLM's profiling run has had; recordings are Python objects, 1 kB an operation.

This is not Inductor's arithmetic, nor CUDA's kernels, memory pool and streams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# These give Python a value, which a recording then keeps. Capturing a CUDA graph, an error.
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal}
UNSEEN = {torch.Tensor.tolist, torch.Tensor.numpy}  # without an operation
# What these give has a shape that depends on values. Capturing a CUDA graph, an error.
SHAPES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"}
LARGE = 10.0
"""By how much poison is larger than the features that it is made of."""


class Slot:
    """What an operation of a recording made."""

    __slots__ = ("number",)

    def __init__(self, number: int):
        self.number = number


def slots_in(tree: Any) -> list[Slot]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Slot)]


class Recorder(TorchDispatchMode):
    """Records the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.warnings: set[str] = set()
        self.slots: Any = WeakTensorKeyDictionary()
        self.kept: Any = WeakTensorKeyDictionary()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, mask = func.overloadpacket.__name__, tree_leaves(args[1:2])
        masked = any(isinstance(m, torch.Tensor) and m.dtype == torch.bool for m in mask)
        if name in SHAPES or (name.startswith("index") and masked):
            self.warnings.add(f"{func}: the shape of what it gives depends on values")
        if func.overloadpacket in READS:
            self.warnings.add(f"{func}: gives Python a value, which a replay keeps")
        else:
            given = self.symbols(args), self.symbols(kwargs)
            self.steps.append(Step(func, *given, self.define(out)))
        return out

    def symbols(self, tree: Any) -> Any:
        return tree_map(self.symbol, tree)

    def symbol(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf in self.slots:
            return Slot(self.slots[leaf])
        self.kept[leaf] = True
        return leaf

    def define(self, out: Any) -> list[int | None]:
        """A number for each tensor that is new; in place, on one that is kept, None."""
        numbers: list[int | None] = []
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf not in self.kept:
                if leaf not in self.slots:
                    self.slots[leaf] = self.count
                    self.count += 1
                numbers.append(self.slots[leaf])
            else:
                numbers.append(None)
        return numbers


class Unseen(TorchFunctionMode):
    """Warns of what reads a tensor without an operation."""

    def __init__(self, warnings: set[str]):
        super().__init__()
        self.warnings = warnings

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in UNSEEN:
            self.warnings.add(f"{func.__name__}: gives Python values, which a replay keeps")
        return func(*args, **(kwargs or {}))


class Step:
    """An operation, with slots among its arguments."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any], defined: list[int | None]):
        self.func, self.args, self.kwargs, self.defined = func, list(args), kwargs, defined
        self.plain = [(i, a.number) for i, a in enumerate(args) if isinstance(a, Slot)]
        self.deep = [(i, a) for i, a in enumerate(args) if not isinstance(a, Slot) and slots_in(a)]
        self.named = {name: value for name, value in kwargs.items() if slots_in(value)}
        self.ends: list[int] = []  # slots that no later step uses

    def run(self, memory: list[Any]) -> None:
        args, kwargs = self.args, self.kwargs
        if self.plain or self.deep:
            args = args.copy()
            for i, number in self.plain:
                args[i] = memory[number]
            for i, tree in self.deep:
                args[i] = filled(tree, memory)
        if self.named:
            kwargs = kwargs | {k: filled(tree, memory) for k, tree in self.named.items()}
        out = self.func(*args, **kwargs)
        for number, made in zip(self.defined, tree_leaves(out)):
            if number is not None:
                memory[number] = made
        for number in self.ends:
            memory[number] = None


def filled(tree: Any, memory: list[Any]) -> Any:
    return tree_map(lambda leaf: memory[leaf.number] if isinstance(leaf, Slot) else leaf, tree)


class Recording:
    """A forward, and the inputs that it was given: those of a replay have to be the same memory."""

    def __init__(self, inputs: dict[str, Any]):
        self.inputs, self.recorder = inputs, Recorder()

    def record(self, forward: Callable[..., Any]) -> Any:
        recorder = self.recorder
        with recorder, Unseen(recorder.warnings):
            out = forward(**self.inputs)
        self.steps, self.slots = recorder.steps, recorder.count
        self.result = recorder.symbols(out)
        last: dict[int, Step] = {}
        for step in self.steps:
            used = [slot.number for slot in slots_in((step.args, step.kwargs))]
            last |= dict.fromkeys([*used, *(n for n in step.defined if n is not None)], step)
        given = {slot.number for slot in slots_in(self.result)}
        for number in last.keys() - given:
            last[number].ends.append(number)
        for left, number in recorder.slots.items():
            if number not in given:
                text = (
                    f"forward leaves a tensor behind, which a replay does not renew: {left.shape}"
                )
                recorder.warnings.add(text)
        return out

    def run(self) -> Any:
        memory: list[Any] = [None] * self.slots
        for step in self.steps:
            step.run(memory)
        return filled(self.result, memory)

    def moved(self, inputs: dict[str, Any], size: int, padded: int) -> str:
        """The input that is not what was recorded, but for rows of padding; nothing if all are."""
        for name in sorted(inputs.keys() | self.inputs.keys()):
            now, then = (tensors(each.get(name)) for each in (inputs, self.inputs))
            if now.keys() != then.keys():
                return name
            for a, b in ((now[key], then[key]) for key in now):
                place = a.data_ptr(), a.stride(), a.dtype, a.dim()
                sizes = zip(a.shape, b.shape)
                same = all(n == m or (n, m) == (size, padded) for n, m in sizes)
                if not same or place != (b.data_ptr(), b.stride(), b.dtype, b.dim()):
                    return name
        return ""


def tensors(value: Any) -> dict[str, torch.Tensor]:
    """An input's: also those of an IntermediateTensors."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    return dict(getattr(value, "tensors", {}))


class Graphs:
    """In place of a model's `forward`, in one of the modes:

    run            Python, as the engine has it
    replay         steps that fit a size are replayed: breakable and full graphs
    replay-decode  those of them in which all requests decode: full graphs, by default

    These steps are run by `graph`; by `python`, on as many rows as a graph has, which is what a
    replay has to equal; or by `poison`: a replay, after which large features are staged.
    """

    def __init__(self, runner: Any, v2: bool):
        self.runner, self.forward, self.v2 = runner, runner.model.forward, v2
        self.embed = getattr(runner.model, "embed_input_ids", None)
        if isinstance(self.forward, Graphs):  # recorded once more
            self.forward, self.embed = self.forward.forward, self.forward.embed
        self.mode, self.by, self.given = "run", "graph", None
        self.recorded: dict[int, Recording] = {}
        self.counts, self.problems = {"replayed": 0, "python": 0}, dict[str, None]()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        if args:
            raise TypeError("model runners name forward's arguments")
        size = inputs["positions"].shape[-1]
        if self.mode == "record":
            self.recorded[size] = Recording(inputs)
            return self.recorded[size].record(self.forward)
        padded = min((s for s in self.recorded if s >= size), default=0)
        fits = self.mode == "replay" or (self.mode == "replay-decode" and self.decodes())
        if padded and fits and (moved := self.recorded[padded].moved(inputs, size, padded)):
            self.problems[f"the input {moved} is not where it was when forward was recorded"] = None
            fits = False
        self.counts["replayed" if padded and fits else "python"] += 1
        if not (padded and fits):
            return self.forward(**inputs)
        pad_slots(size, padded)
        recording = self.recorded[padded]
        out = self.forward(**recording.inputs) if self.by == "python" else recording.run()
        if self.by == "poison" and self.given is not None:
            self.stage(padded)
        return tree_map(lambda t: t[:size] if isinstance(t, torch.Tensor) else t, out)

    def decodes(self) -> bool:
        """Whether each request has one token, and those that were speculated for it."""
        requests = self.runner.input_batch.num_reqs
        tokens = np.diff(self.runner.query_start_loc.np[: requests + 1])
        if not (tokens == self.runner.uniform_decode_query_len).all():
            return False
        # Of a prompt that is not yet computed, V2 takes one token over existing context.
        batch = self.runner.input_batch
        computed = batch.num_computed_tokens_cpu[:requests]
        prefills = computed < batch.num_prompt_tokens[:requests]
        return not self.v2 or bool((~prefills | (tokens == 1) & (computed > 0)).all())

    def embed_input_ids(self, input_ids: Any, embeddings: Any = None, **more: Any) -> Any:
        embeddings = more.pop("multimodal_embeddings", embeddings)
        if embeddings is not None and len(embeddings):
            self.given = torch.cat([e for e in embeddings]).clone()
        return self.embed(input_ids, embeddings, **more)  # type: ignore[misc]

    def stage(self, rows: int) -> None:
        """Poison: stages large features in each row, as if the step had held a medium there. The
        next step must not see them. (Empty rows must not be filled: a replay reads them as zeros.)
        """
        features = LARGE * self.given.repeat(-(-rows // len(self.given)), 1)[:rows]  # type: ignore
        ids, all_rows = torch.zeros(rows, dtype=torch.int32), torch.ones(rows, dtype=torch.bool)
        self.embed(ids, [features], is_multimodal=all_rows)  # type: ignore[misc]


def pad_slots(size: int, padded: int) -> None:
    """Rows of padding write nothing to the KV cache: their slot is -1, as in vLLM."""
    from vllm.forward_context import get_forward_context

    context, made = get_forward_context(), dict[int, torch.Tensor]()

    def pad(slots: Any) -> Any:
        if slots is None or len(slots) >= padded:
            return slots
        at = slots.data_ptr()
        if at not in made:
            made[at] = torch.nn.functional.pad(slots, (0, padded - size), value=-1)
        return made[at]

    if isinstance(context.slot_mapping, dict):
        context.slot_mapping = {name: pad(slots) for name, slots in context.slot_mapping.items()}
    for metadata in (context.attn_metadata or {}).values():
        metadata.slot_mapping = pad(metadata.slot_mapping)


def sort_as_v2(runner: Any, scheduled: Any) -> None:
    """Rows as Model Runner V2 has them: decodes, then prefills, the shortest first."""
    tokens, drafts = scheduled.num_scheduled_tokens, scheduled.scheduled_spec_decode_tokens
    wanted = sorted(
        tokens,
        key=lambda r: (not drafts.get(r), tokens[r] != runner.uniform_decode_query_len, tokens[r]),
    )
    batch = runner.input_batch
    for row, request in enumerate(wanted):
        if (at := batch.req_id_to_index[request]) != row:
            batch.swap_states(row, at)


def capture_sizes(vllm_config: Any) -> list[int]:
    """By vLLM's own formula, which it does not ask for an eager engine."""
    from vllm.config import CUDAGraphMode

    config, parts = copy.copy(vllm_config), ("model_config", "compilation_config")
    config.__dict__ |= {part: copy.copy(getattr(config, part)) for part in parts}
    config.model_config.enforce_eager = False
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    config.compilation_config.cudagraph_capture_sizes = None
    config.compilation_config.max_cudagraph_capture_size = None
    config._set_cudagraph_sizes()
    return config.compilation_config.cudagraph_capture_sizes


class Replay:
    """What vLLM adds to its worker's class; called with `LLM.collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def replay_record(self, v2: bool = True, sizes: list[int] | None = None) -> dict[str, Any]:
        """Records `forward` at `sizes` (default: vLLM's own), as it is captured: the largest first,
        after dummy runs. `v2`: rows in Model Runner V2's order, and its rule for decode graphs.
        Gives the sizes, and warnings of what a recording cannot hold; or why nothing is recorded.
        """
        config, runner = self.vllm_config, self.model_runner
        if config.parallel_config.world_size > 1:
            return {"refused": "replay is of one worker: no tensor or pipeline parallelism"}
        if not (runner.device.type == "cpu" and config.model_config.enforce_eager):
            return {"refused": "replay is of an eager engine on a CPU"}
        graphs = runner.model.forward = Graphs(runner, v2)
        if graphs.embed is not None:
            object.__setattr__(runner.model, "embed_input_ids", graphs.embed_input_ids)
        runner.__dict__.pop("_may_reorder_batch", None)
        if v2:
            runner._may_reorder_batch = partial(sort_as_v2, runner)
        for size in sorted(sizes or capture_sizes(config), reverse=True):
            for graphs.mode in ("run", "record"):
                runner._dummy_run(size)
        graphs.mode = "run"
        warnings = {text for each in graphs.recorded.values() for text in each.recorder.warnings}
        return {"sizes": sorted(graphs.recorded), "warnings": sorted(warnings)}

    def replay_mode(self, mode: str, by: str = "graph") -> tuple[str, str]:
        """From the next step on, as `Graphs` has it. Gives what was before."""
        graphs = self.model_runner.model.forward
        before, (graphs.mode, graphs.by) = (graphs.mode, graphs.by), (mode, by)
        return before

    def replay_counts(self) -> dict[str, Any]:
        """Since it was last asked: steps that were replayed, and others; and problems that kept
        steps from being replayed."""
        graphs = self.model_runner.model.forward
        counts = graphs.counts | {"problems": list(graphs.problems)}
        graphs.counts, graphs.problems = dict.fromkeys(graphs.counts, 0), {}
        return counts
