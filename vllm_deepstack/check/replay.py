"""What a replayed CUDA graph does, on a CPU engine: `--worker-extension-cls …replay.Replay`.

vLLM captures the model's outer `forward` at some sizes, while nothing is staged. A replay runs the
kernels again, on the same memory, and none of the Python. Here PyTorch's operations are recorded:

    forward        y = x[:4]; y = norm(y, w); self.count = 0; return y + buffer[:4]
    recorded       0 = slice(x, 4); 1 = norm(0, w); 2 = slice(buffer, 4); 3 = add(1, 2); return 3
    kept           x, w, buffer: the memory that no recorded operation made
    not recorded   self.count = 0

Attention's operations read the step's metadata when they run, as they do in breakable graphs. A
replay takes as much memory as a forward, which vLLM's profiling run has had; a recording, 1 kB an
operation. This is not Inductor's arithmetic, nor CUDA's kernels, memory pool and streams.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

# What Python has to wait for, a capture refuses. PyTorch does not tag all operations that give it
# values, or shapes that depend on values. Of `tolist` and `numpy`, `resolve_conj` is all there is.
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UNTAGGED = {"is_nonzero.default", "where.default", "repeat_interleave.self_Tensor"}
UNTAGGED |= {"resolve_conj.default"}
LARGE = 10.0  # times the features that poison is made of


class Slot(int):
    """The number of what an operation of a recording made."""


def slots_in(tree: Any) -> list[int]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Slot)]


def filled(tree: Any, memory: list[Any]) -> Any:
    return tree_map(lambda leaf: memory[leaf] if isinstance(leaf, Slot) else leaf, tree)


def waits(func: Any, args: Any) -> bool:
    name = func.overloadpacket.__name__
    if name.startswith("index"):  # by a mask; but one value is put as a fill is
        masked = any(getattr(i, "dtype", None) == torch.bool for i in tree_leaves(args[1:2]))
        return masked and not (name.startswith("index_put") and args[2].numel() == 1)
    lists = name == "lift_fresh" and args[0].dim() > 0  # of Python's values
    return lists or bool(TAGS & set(func.tags)) or str(func).removeprefix("aten.") in UNTAGGED


class Step:
    """An operation, with slots among its arguments, and the slots that it defines."""

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any], defined: list[int | None]):
        self.func, self.args, self.kwargs, self.defined = func, args, kwargs, defined
        self.nested = bool(slots_in(([a for a in args if not isinstance(a, Slot)], kwargs)))
        self.ends: list[int] = []  # slots that no later step uses

    def run(self, memory: list[Any]) -> None:
        args, kwargs = self.args, self.kwargs
        if self.nested:
            args, kwargs = filled((args, kwargs), memory)
        else:  # the same, and faster
            args = [memory[a] if isinstance(a, Slot) else a for a in args]
        for number, made in zip(self.defined, tree_leaves(self.func(*args, **kwargs))):
            if number is not None:
                memory[number] = made
        for number in self.ends:
            memory[number] = None


class Recording(TorchDispatchMode):
    """A forward of inputs, and what it may not be replayed for: `warnings`."""

    def __init__(self, inputs: dict[str, Any]):
        super().__init__()
        self.inputs, self.steps, self.warnings = inputs, list[Step](), set[str]()
        self.made: Any = WeakTensorKeyDictionary()  # numbers of slots
        self.kept: Any = WeakTensorKeyDictionary()
        self.count = 0

    def record(self, forward: Any) -> Any:
        with self:
            out = forward(**self.inputs)
        self.result = tree_map(self.symbol, out)
        given, last = set(slots_in(self.result)), dict[int, Step]()
        for step in self.steps:
            used = slots_in((step.args, step.kwargs))
            last |= dict.fromkeys([*used, *(n for n in step.defined if n is not None)], step)
        for number in last.keys() - given:
            last[number].ends.append(number)
        left = (tensor.shape for tensor, number in self.made.items() if number not in given)
        self.warnings |= {f"forward leaves behind what no replay renews: {shape}" for shape in left}
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if waits(func, args):
            self.warnings.add(f"{func}: what it gives depends on values; Python waits for it")
        given, more = tree_map(self.symbol, (args, kwargs or {}))
        self.steps.append(Step(func, given, more, [self.define(leaf) for leaf in tree_leaves(out)]))
        return out

    def symbol(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf in self.made:
            return Slot(self.made[leaf])
        self.kept[leaf] = True
        return leaf.detach()  # its memory, whatever `leaf.data` is later

    def define(self, leaf: Any) -> int | None:
        """The number of what is new; nothing of what is kept, and was written in place."""
        if not isinstance(leaf, torch.Tensor) or leaf in self.kept:
            return None
        if leaf not in self.made:
            self.made[leaf] = self.count
            self.count += 1
        return self.made[leaf]

    def run(self) -> Any:
        memory: list[Any] = [None] * self.count
        for step in self.steps:
            step.run(memory)
        return filled(self.result, memory)

    def moved(self, inputs: dict[str, Any], size: int, padded: int) -> str:
        """The input that is not what was recorded, but for rows of padding; nothing if all are."""
        for name in sorted(inputs.keys() | self.inputs.keys()):
            now, then = (places(i.get(name), size, padded) for i in (inputs, self.inputs))
            if now != then:
                return name
        return ""


def places(value: Any, size: int, padded: int) -> list[Any]:
    """Where an input's tensors are; also those of lists, and of an IntermediateTensors."""
    return [
        (t.data_ptr(), t.stride(), t.dtype, [size if n == padded else n for n in t.shape])
        for t in tree_leaves(getattr(value, "tensors", value))
        if isinstance(t, torch.Tensor)
    ]


class Graphs:
    """In place of a model's `forward`, in one of the modes:

    run            Python, as the engine has it
    replay         steps that fit a size are replayed: breakable and full graphs
    replay-decode  those of them in which all requests decode: full graphs, by default

    These steps are run by `graph`; by `python`, on as many rows as a graph has, which is what a
    replay has to equal; or by `poison`: after each, another one is replayed that has large features
    in all rows. The next must not see them. It shows a leak by one medium and one step.
    """

    def __init__(self, runner: Any, v2: bool):
        self.runner, self.forward, self.v2 = runner, runner.model.forward, v2
        self.embed: Any = getattr(runner.model, "embed_input_ids", None)
        if isinstance(self.forward, Graphs):  # recorded once more
            self.forward, self.embed = self.forward.forward, self.forward.embed
        self.mode, self.by, self.recorded = "run", "graph", dict[int, Recording]()
        self.medium: tuple[Any, Any] | None = None  # features, and the token that they are of
        self.counts, self.problems = {"replayed": 0, "python": 0}, dict[str, None]()

    def __call__(self, **inputs: Any) -> Any:
        size = inputs["positions"].shape[-1]
        if self.mode == "record":
            recording = self.recorded[size] = Recording(inputs)
            return recording.record(self.forward)
        padded = min((s for s in self.recorded if s >= size), default=0)
        fits = self.mode == "replay" or (self.mode == "replay-decode" and self.decodes(padded))
        if padded and fits and (moved := self.recorded[padded].moved(inputs, size, padded)):
            self.problems[f"the input {moved} is not where it was when forward was recorded"] = None
            fits = False
        self.counts["replayed" if padded and fits else "python"] += 1
        if not (padded and fits):
            return self.forward(**inputs)
        context, recording = pad_slots(size, padded), self.recorded[padded]
        out = self.forward(**recording.inputs) if self.by == "python" else recording.run()
        if self.by == "poison" and self.stage_everywhere(padded, inputs):
            context.attn_metadata, context.slot_mapping = None, {}  # as a dummy run: no cache
            recording.run()
        return tree_map(lambda t: t[:size] if isinstance(t, torch.Tensor) else t, out)

    def decodes(self, padded: int) -> bool:
        """Whether each request has one token, and those that were speculated for it."""
        batch, query = self.runner.input_batch, self.runner.uniform_decode_query_len
        tokens = np.diff(self.runner.query_start_loc.np[: (requests := batch.num_reqs) + 1])
        # Of a prompt that is not yet computed, V2 takes one token over existing context.
        computed = batch.num_computed_tokens_cpu[:requests]
        prefills = computed < batch.num_prompt_tokens[:requests]
        decodes = ~prefills | (tokens == 1) & (computed > 0)
        captured = padded <= self.runner.max_num_reqs * query
        return bool(captured and (tokens == query).all() and (not self.v2 or decodes.all()))

    def embed_input_ids(self, *args: Any, **more: Any) -> Any:
        given = more.get("multimodal_embeddings", args[1] if len(args) > 1 else None)
        if given is not None and len(given) and more.get("is_multimodal") is not None:
            # Of media of several kinds, an image's, with its levels.
            widest = max(range(len(given)), key=lambda i: given[i].shape[-1])
            place = sum(len(each) for each in given[:widest])
            self.medium = given[widest].clone(), args[0][more["is_multimodal"]][place].clone()
        return self.embed(*args, **more)

    def stage_everywhere(self, rows: int, inputs: dict[str, Any]) -> bool:
        """By the model's own means. (To fill empty rows is wrong: a replay reads them as zeros.)
        Whether there are levels to stage."""
        if self.medium is None or self.medium[0].shape[-1] <= inputs["inputs_embeds"].shape[-1]:
            return False
        features, token = self.medium
        features = LARGE * features.repeat(-(-rows // len(features)), 1)[:rows]
        everywhere = torch.ones(rows, dtype=torch.bool)
        self.embed(token.repeat(rows), [features], is_multimodal=everywhere)
        return True


def pad_slots(size: int, padded: int) -> Any:
    """The step's context, in which rows of padding have no slot in the KV cache: -1, as in vLLM."""
    from vllm.forward_context import get_forward_context

    def pad(slots: Any) -> Any:
        if slots is None or len(slots) >= padded:
            return slots
        return torch.nn.functional.pad(slots, (0, padded - size), value=-1)

    context = get_forward_context()
    if isinstance(context.slot_mapping, dict):
        context.slot_mapping = {name: pad(slots) for name, slots in context.slot_mapping.items()}
    for metadata in (context.attn_metadata or {}).values():
        if hasattr(metadata, "slot_mapping"):  # Mamba's has none
            metadata.slot_mapping = pad(metadata.slot_mapping)
    return context


def sort_as_v2(runner: Any, scheduled: Any) -> None:
    """Rows as Model Runner V2 has them: decodes, then prefills, the shortest first."""
    tokens, drafts = scheduled.num_scheduled_tokens, scheduled.scheduled_spec_decode_tokens
    query, batch = runner.uniform_decode_query_len, runner.input_batch
    wanted = sorted(tokens, key=lambda r: (not drafts.get(r), tokens[r] != query, tokens[r]))
    for row, request in enumerate(wanted):
        if (at := batch.req_id_to_index[request]) != row:
            batch.swap_states(row, at)


def capture_sizes(vllm_config: Any) -> list[int]:
    """By vLLM's own formula, which it does not ask for an eager engine."""
    from vllm.config import CUDAGraphMode

    config = copy.copy(vllm_config)
    for part in ("model_config", "compilation_config"):
        setattr(config, part, copy.copy(getattr(config, part)))
    config.model_config.enforce_eager, graphs = False, config.compilation_config
    graphs.cudagraph_mode = CUDAGraphMode.FULL
    graphs.cudagraph_capture_sizes = graphs.max_cudagraph_capture_size = None
    config._set_cudagraph_sizes()
    return graphs.cudagraph_capture_sizes


class Replay:
    """What vLLM adds to its worker's class; called with `LLM.collective_rpc`."""

    def replay_record(self: Any, v2: bool = True, sizes: list[int] | None = None) -> dict[str, Any]:
        """Records `forward` at `sizes` (default: vLLM's own), as it is captured: the largest first,
        after dummy runs. `v2`: rows in Model Runner V2's order, and its rule for decode graphs.
        Gives the sizes, and warnings of what a recording cannot hold; or why it is refused."""
        config, runner = self.vllm_config, self.model_runner
        sharded, eager = config.parallel_config.world_size > 1, config.model_config.enforce_eager
        if sharded or config.lora_config or not eager or runner.device.type != "cpu":
            return {"refused": "replay is of an eager engine on a CPU, of one worker, without LoRA"}
        graphs = runner.model.forward = Graphs(runner, v2)
        if graphs.embed is not None:
            runner.model.embed_input_ids = graphs.embed_input_ids
        runner.__dict__.pop("_may_reorder_batch", None)
        if v2:
            runner._may_reorder_batch = lambda scheduled: sort_as_v2(runner, scheduled)
        for size in sorted(sizes or capture_sizes(config), reverse=True):
            for graphs.mode in ("run", "record"):
                runner._dummy_run(size)
        graphs.mode = "run"
        warnings = {text for each in graphs.recorded.values() for text in each.warnings}
        return {"sizes": sorted(graphs.recorded), "warnings": sorted(warnings)}

    def replay_mode(self: Any, mode: str, by: str = "graph") -> tuple[str, str]:
        """From the next step on, as `Graphs` has it. Gives what was before."""
        graphs = self.model_runner.model.forward
        before, (graphs.mode, graphs.by) = (graphs.mode, graphs.by), (mode, by)
        return before

    def replay_counts(self: Any) -> dict[str, Any]:
        """Since it was last asked: steps replayed, and others; problems that kept steps from it."""
        graphs = self.model_runner.model.forward
        counts = graphs.counts | {"problems": list(graphs.problems)}
        graphs.counts, graphs.problems = dict.fromkeys(graphs.counts, 0), {}
        return counts
