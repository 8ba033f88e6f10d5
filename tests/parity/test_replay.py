"""What a replayed CUDA graph does, asked of the recordings that stand in for it. No engine."""

import ast
import functools
import re
import sys
import weakref
from types import SimpleNamespace as Some
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import BUILD, examples
from vllm_deepstack.check import replay
from vllm_deepstack.patch.verbs import installed

ROWS, INDEX, WEIGHT = 16, torch.tensor([2, 0]), torch.linspace(-1, 1, 9).view(3, 3)
PAD_SLOTS = replay.pad_slots


@pytest.fixture(autouse=True, scope="module")
def as_in_an_engine():
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "pad_slots", lambda size, padded: Some())
        yield


class Engine:
    """A `forward` that was captured at some sizes, and the buffers of its inputs."""

    def __init__(self, forward, sizes=(8, 4), embed=None, **inputs):
        self.x, self.positions, self.inputs = torch.zeros(ROWS, 3), torch.arange(ROWS), inputs
        model = Some(forward=forward, embed_input_ids=embed)
        self.graphs = replay.Graphs(Some(model=model, **step_of([1])), v2=False)
        for size in sizes:
            for self.graphs.mode in ("run", "record"):
                self.run(size)
        self.graphs.mode, self.graphs.counts = "replay", {"replayed": 0, "python": 0}
        self.warnings = {w for r in self.graphs.recorded.values() for w in r.warnings}

    def run(self, size, **other):
        inputs = {"positions": self.positions[:size], "x": self.x[:size], **self.inputs, **other}
        return self.graphs(**inputs)

    def step(self, values, by="graph"):
        self.x[: len(values)].copy_(values)
        self.graphs.by = by
        return self.run(len(values))


def step_of(tokens, computed=(9,) * 9, prompts=(5,) * 9, query=1):
    """What a model runner knows of a step's requests; later rows are of earlier steps."""
    computed, prompts = np.array([*computed, 0]), np.array([*prompts, 7])
    batch = Some(num_reqs=len(tokens), num_computed_tokens_cpu=computed, num_prompt_tokens=prompts)
    starts = Some(np=np.array([0, *np.cumsum(tokens), 99, 99]))
    step = {"input_batch": batch, "query_start_loc": starts, "uniform_decode_query_len": query}
    return {**step, "max_num_reqs": ROWS}


def exactly(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def agree(program, sizes=(3, 8, 1, 4, 3)):
    """A program of an input and a kept buffer gives and writes what it does in Python on as many
    rows, step after step with other values; it has nothing that a capture refuses."""
    kept, generator = [torch.ones(ROWS, 3) for _ in range(2)], torch.Generator().manual_seed(0)
    ours, theirs = (Engine(lambda positions, x, k=k: program(x, k)) for k in kept)
    for size in sizes:
        values = torch.randn(size, 3, generator=generator)
        exactly(ours.step(values), theirs.step(values, "python"))
        exactly([ours.x, kept[0]], [theirs.x, kept[1]])
    assert ours.graphs.counts == {"replayed": len(sizes), "python": 0}
    assert not ours.warnings and not ours.graphs.problems


# Of an input `x` and a kept buffer `k`; each gives all that it names.
PROGRAMS = """
y = x + 1; z = y.mul_(2); y[1:] = 0.5; y[:, 0] += x[:, 1]; y.unsqueeze_(0).squeeze_(0)
k[: len(x)].add_(x); k.mul_(0.5); y = k[: len(x)] + 1; z = k.add_(x.sum())
z = x.copy_(x.flip(0)); x[0].add_(1); y = x * 1
y = x @ WEIGHT; y.view(-1)[1:].sub_(1); y.t()[0] = 5; z = y.detach().add_(1); y.data.mul_(3)
y = k[:1].expand(len(x), 3) + x; rows = k[: len(x)].transpose(0, 1); rows[1] = x[:, 2]; z = rows.t()
a, b, c = (x + 1).unbind(1); b.add_(a); y = torch.stack([a, b, c], 1); z = torch.cat([y, x], dim=1)
a, b = torch.split(x * 2, [1, 2], 1); b.zero_(); z = k[: len(x)].chunk(3, 1); z[2].copy_(a)
y = torch.empty_like(x); z = torch.add(x, 1, out=y); torch.mul(input=x, other=y, out=k[: len(x)])
a = torch.max(x, 1, out=(torch.empty(len(x)), torch.empty(len(x)).long())); z = [a[0], (None, 7)]
y = torch.cat(tensors=[x, k[: len(x)]], dim=1); z = torch.addmm(input=x, mat1=x, mat2=WEIGHT)
y = torch.zeros_like(x); y.index_put_((torch.arange(1),), x[:1], accumulate=True); k[INDEX] = x[0]
y = torch.where(x > 0, x, k[: len(x)]); k.index_copy_(0, INDEX, x[:1].expand(2, 3)); z = k[INDEX]
x[x > 0] = 0; y = x * torch.arange(3); z = {"a": x.double(), "b": (y, [y, k])}
"""
# On tensors of a pool; what is written, other tensors of it show.
OPERATIONS = [
    *("pool.append(a + b)", "pool.append(torch.tanh(a) @ WEIGHT)", "pool.append(a.view_as(b))"),
    *("pool.append(a.flip(0))", "pool.append(a.t().reshape(3, -1).t())", "a.mul_(0.5)"),
    *("pool.extend(torch.stack([a, b]).unbind(0))", "torch.sub(a.clone(), b.clone(), out=c)"),
    *("pool.extend(torch.cat([a, b], 1).chunk(2, 1))", "a[:, :2].copy_(b.clone()[:, 1:])"),
    *("a[-1].copy_(b[0].clone())", "a.transpose(0, 1)[1].sub_(b[:, 0].clone())", "a.zero_()"),
]
PLACE = st.integers(0, 99)
RANDOM = st.lists(st.tuples(st.sampled_from(OPERATIONS), PLACE, PLACE, PLACE), max_size=15)


@pytest.mark.parametrize("text", PROGRAMS.strip().splitlines())
def test_operations_run_on_the_same_memory(text):
    def program(x, k):
        exec(text, globals(), names := {"x": x, "k": k})
        return names

    agree(program)


@settings(max_examples=examples(100), deadline=None)
@given(RANDOM, st.lists(PLACE, min_size=1, max_size=3), st.tuples(*[st.integers(1, 8)] * 3))
def test_random_programs(steps, given, sizes):
    def program(x, kept):
        pool = [x, kept[: len(x)], x * 2]
        for operation, *places in steps:
            tensors = dict(zip("abc", (pool[place % len(pool)] for place in places)))
            exec(operation, globals() | {"pool": pool} | tensors)
        return [pool[place % len(pool)] for place in given]

    agree(program, sizes)


class Alive(TorchDispatchMode):
    """The memory of tensors that operations made: what is alive, and the most that was at once."""

    made: tuple = ()
    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += tuple(map(weakref.ref, tree_leaves(out)))
        self.most = max(self.most, len(self.now()))
        return out

    def now(self):
        tensors = [tensor for made in self.made if (tensor := made()) is not None]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_a_tensor_ends_after_its_last_use_and_a_recording_holds_none():
    def forward(positions, x):
        for _ in range(20):
            x = torch.relu(x @ WEIGHT)
            torch.tanh(x)  # nobody uses it
        return x.view(-1), x

    with Alive() as recording:
        engine = Engine(forward, [4])
    assert recording.now() <= {t.data_ptr() for t in (engine.x, engine.positions, WEIGHT)}
    with Alive() as replayed:
        out = engine.graphs.recorded[4].run()
    assert replayed.now() == {out[0].data_ptr()} and replayed.most <= 2


def test_steps_are_padded_to_the_next_size_and_larger_ones_run_in_python():
    calls = []
    engine = Engine(lambda positions, x: calls.append(len(positions)) or x + 1)
    for size in (1, 3, 4, 5, 8, 5):
        exactly(engine.step(torch.full((size, 3), 7.0)), torch.full((size, 3), 8.0))
    assert calls == [8, 8, 4, 4] and engine.graphs.counts["replayed"] == 6
    for size, rows in ((5, 8), (3, 4)):
        assert len(engine.step(torch.ones(size, 3), "python")) == size and calls[-1] == rows
    assert len(engine.step(torch.ones(9, 3))) == calls[-1] == 9
    engine.graphs.mode = "replay-decode"
    assert len(engine.step(torch.ones(3, 3))) == 3 and calls[-1] == 9
    engine.graphs.runner.query_start_loc.np[1] = 3  # a prefill
    assert len(engine.step(torch.ones(3, 3))) == calls[-1] == 3
    engine.graphs.mode = "run"
    assert len(engine.step(torch.ones(2, 3))) == calls[-1] == 2


@pytest.mark.parametrize(
    "name, moved",
    [
        *(
            ("x", torch.ones(3, 3)),
            ("x", None),
            ("positions", lambda engine: engine.positions[:6:2]),
        ),
        *(("mask", torch.ones(3)), ("between", Some(tensors=dict.fromkeys("ab", torch.ones(3))))),
        ("encoder_outputs", [torch.ones(2)]),
    ],
)
def test_a_step_of_which_an_input_moved_runs_in_python_and_the_input_is_named(name, moved):
    hidden, calls = torch.zeros(ROWS), []
    four, three = (Some(tensors=dict.fromkeys("ab", hidden[:n])) for n in (4, 3))
    forward = lambda between, **_: calls.append(1) or between.tensors["a"] + 1  # noqa: E731
    engine = Engine(forward, [4], between=four)
    hidden.fill_(5)
    exactly(engine.run(3, between=three), torch.full((3,), 6.0))
    assert engine.graphs.counts["replayed"] == 1 and not engine.graphs.problems
    engine.run(3, **{"between": three, name: moved(engine) if callable(moved) else moved})
    assert engine.graphs.counts == {"replayed": 1, "python": 1} and len(calls) == 3
    assert [f" {name} " in problem for problem in engine.graphs.problems] == [True]


class Staging:
    """A model whose features are staged before `forward`, which adds them, and are cleared by
    forward's Python, by an operation in it, or by `embed_input_ids`. `asks`: whether any are."""

    def __init__(self, clears, asks=False):
        self.buffer, self.staged, self.clears, self.asks = torch.zeros(ROWS, 3), 0, clears, asks
        narrow = torch.zeros(ROWS, 2)  # features have levels, too
        self.engine = Engine(self.forward, embed=self.embed, inputs_embeds=narrow)

    def embed(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        if self.clears == "embed":
            self.buffer.zero_()
        if multimodal_embeddings is not None:
            self.staged = len(input_ids)
            self.buffer[: self.staged][is_multimodal] = torch.cat(list(multimodal_embeddings))

    def forward(self, positions, x, inputs_embeds=None):
        rows = self.buffer[: len(x)]
        if self.clears == "rows that nobody staged":
            rows[self.staged :].zero_()
        out = x + rows if self.staged or not self.asks else x * 1
        if self.clears == "operation" or (self.clears == "python" and self.staged):
            rows.zero_()
            self.staged = 0
        return out

    def serve(self, rows, feature=None, by="graph"):
        """A step in which each row is of a medium, or none; gives what its first row reads."""
        media = [torch.full((rows, 3), feature)] if feature else None
        given = {"multimodal_embeddings": media, "is_multimodal": torch.ones(rows).bool()}
        self.engine.graphs.embed_input_ids(torch.zeros(rows), **given)
        return self.engine.step(torch.zeros(rows, 3), by)[0, 0].item()


@pytest.mark.parametrize(
    "clears, asks, replayed, in_python",
    [
        ("embed", False, [2, 0, 5], [2, 0, 5]),
        ("operation", False, [2, 0, 5], [2, 0, 5]),
        ("python", False, [2, 2, 5], [2, 0, 5]),  # D2
        ("python", True, [0, 0, 0], [2, 0, 5]),  # D1
        ("rows that nobody staged", False, [0, 0, 0], [2, 2, 5]),  # D22
    ],
)
def test_who_reads_what_was_staged(clears, asks, replayed, in_python):
    for by, read in (("graph", replayed), ("python", in_python)):
        model = Staging(clears, asks)
        assert [model.serve(3, 2.0, by), model.serve(3, None, by), model.serve(2, 5.0, by)] == read
        assert by == "python" or model.staged == 2  # no Python resets it


@pytest.mark.parametrize("how", ["buffer", "data"])
def test_a_buffer_that_was_exchanged_is_not_seen(how):
    """D5."""
    model = Staging("")
    setattr(model if how == "buffer" else model.buffer, how, torch.zeros(2 * ROWS, 3))
    assert model.serve(3, 2.0) == 0 and model.serve(3, None, "python") == 2


@pytest.mark.parametrize(
    "clears, read",
    [("python", 20), ("embed", 0), ("operation", 0)],
)
def test_poison_reaches_the_next_step_where_nothing_clears_it(clears, read):
    model = Staging(clears)
    assert model.serve(3, None, "poison") == model.serve(3, None, "poison") == 0  # made of a medium
    assert model.serve(3, 2.0, "poison") == 2 and model.serve(4) == read


@pytest.mark.parametrize(
    "more",
    [
        *([[torch.ones(1, 3)]], [torch.ones(2, 1, 3)], [[]]),
        *([[torch.ones(1, 3), torch.ones(1, 9)]], []),  # a sound beside an image; text alone
    ],
)
def test_embeddings_are_passed_on_as_they_are(more):
    graphs = Engine(lambda positions, x: x, embed=lambda *given: given).graphs
    exactly(graphs.embed_input_ids(INDEX, *more), (INDEX, *more))


# What a forward of `x` does, and what a warning may call it.
READS = """bool(x.any()): is_nonzero|item; torch.equal(x, -x): equal; x.tolist(): resolve_conj
x.cpu().numpy(): resolve_conj; x.nonzero(): nonzero; x.masked_select(x > 0): masked_select
x[x > 0]: index
x.clone().index_put_((x < 0,), x[:0, 0]): index_put; x.unique(): unique
x.sum().item(): item; x[: x[0, 0].long()]: item; 1.0 in x: item
np.asarray(x): resolve_conj; torch.allclose(x, x): allclose; torch.where(x > 0): where|nonzero
torch.argwhere(x): where|nonzero; x.repeat_interleave(x[:, 0].long(), 0): repeat_interleave
x + torch.tensor([1.0, 2.0, 3.0]): lift_fresh|tensor"""


@pytest.mark.parametrize("read", re.split("; |\n", READS))
def test_what_a_capture_refuses_is_named(read):
    """As an H200 refuses each: Python gets a value, or gives one, or a shape depends on one."""
    does, _, names = read.rpartition(": ")
    warnings = Engine(lambda positions, x: [eval(does, globals(), {"x": x}), x + 1][1]).warnings
    assert any(name in text for name in names.split("|") for text in warnings)


@pytest.mark.parametrize("left", [True, False])
def test_a_tensor_that_forward_leaves_behind_is_named(left):
    """But not one that it gives, an input, or what nobody holds."""
    model = Some(last=None)

    def forward(positions, x):
        out = x @ (made := x.t() @ x)
        model.last = [made if left else out, x, positions]
        return out

    assert [str(torch.Size([3, 3])) in text for text in Engine(forward).warnings] == [True] * left


@pytest.fixture
def context(monkeypatch):
    """Of a forward."""
    found = Some(slot_mapping={}, attn_metadata=None)
    vllm = Some(get_forward_context=lambda: found)
    monkeypatch.setitem(sys.modules, "vllm", Some(forward_context=vllm))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", vllm)
    return found


def test_rows_of_padding_have_no_slot_in_the_cache(context):
    slots, full = torch.arange(3), torch.arange(8)
    mapping = {"a": slots, "b": slots, "full": full, "none": None}
    metadata = {name: Some(slot_mapping=each) for name, each in mapping.items()}
    context.slot_mapping, context.attn_metadata = dict(mapping), metadata
    PAD_SLOTS(3, 8)
    wanted = [padded := torch.tensor([0, 1, 2, *[-1] * 5]), padded, full, None]
    exactly([*context.slot_mapping.values()], wanted)
    exactly([each.slot_mapping for each in metadata.values()], wanted)
    exactly(slots, torch.arange(3))


@pytest.mark.parametrize("metadata", [None, {}, {"mamba": Some()}])
def test_what_has_no_slots(context, metadata):
    context.attn_metadata = metadata
    for context.slot_mapping in ({}, [{}], None):
        PAD_SLOTS(3, 8)


@functools.cache
def vllms(path, name):
    """A function of vLLM's, from each release at hand; nothing of vLLM is imported."""
    found = []
    for folder in [installed(), *BUILD.glob("sdist/*/vllm"), *BUILD.glob("stock/*/vllm")]:
        tree = ast.walk(ast.parse(file.read_text())) if (file := folder / path).is_file() else ()
        for node in (n for n in tree if isinstance(n, ast.FunctionDef) and n.name == name):
            node.decorator_list, space = [], {}
            exec(compile(ast.Module([node], []), path, "exec"), space)
            found.append(space[name])
    return found


def sorted_rows(tokens, drafts, query, rows):
    """Of the requests that are in a batch's rows."""
    batch = Some(req_id_to_index={request: row for row, request in enumerate(rows)})

    def swap_states(a, b):
        rows[a], rows[b] = rows[b], rows[a]
        batch.req_id_to_index |= {rows[a]: a, rows[b]: b}

    batch.swap_states = swap_states
    scheduled = Some(num_scheduled_tokens=tokens, scheduled_spec_decode_tokens=drafts)
    replay.sort_as_v2(Some(input_batch=batch, uniform_decode_query_len=query), scheduled)
    return "".join(rows)


@settings(deadline=None)
@given(st.lists(st.tuples(PLACE, st.integers(0, 3)), max_size=9), st.integers(1, 4), st.randoms())
def test_decodes_come_first_then_the_shortest(requests, query, random):
    assert sorted_rows({"a": 7, "b": 1, "c": 3, "d": 1}, {}, 1, list("dcba")) == "bdca"
    drafts = {"a": [5], "b": [], "c": [5, 5]}
    assert sorted_rows({"a": 2, "b": 1, "c": 3, "d": 3}, drafts, 3, list("abcd")) == "cadb"
    tokens = {chr(97 + i): 1 + place % 3 + drafts for i, (place, drafts) in enumerate(requests)}
    drafts = {name: [0] * drafts for name, (_, drafts) in zip(tokens, requests) if drafts != 1}
    rows = random.sample(list(tokens), len(tokens))
    for theirs in vllms("v1/worker/gpu/model_runner.py", "sort_batch_req_ids"):
        if theirs.__code__.co_argcount < 3:  # of earlier releases
            continue
        assert sorted_rows(tokens, drafts, query, rows[:]) == "".join(theirs(tokens, drafts, query))


def decode(v2, *step):
    return replay.Graphs(Some(model=Some(forward=None), **step_of(*step)), v2).decodes(4)


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 3))
def test_who_decodes_for_model_runner_v1(tokens, query):
    for theirs in vllms("v1/worker/gpu_model_runner.py", "_is_uniform_decode"):
        ours = decode(False, tokens, [0] * 9, [8] * 9, query)
        assert ours == theirs(max(tokens), query, sum(tokens), len(tokens))


def test_who_decodes_for_model_runner_v2():
    assert decode(True, [1, 1], [5, 9], [5, 5])
    assert decode(True, [1, 1], [5, 4], [5, 9])  # one more token of a prompt, over what is there
    assert not decode(True, [1, 1], [5, 0], [5, 1])  # a prompt of one token
    assert decode(True, [3, 3], [5, 6], [5, 5], 3)
    assert not decode(True, [3, 1], [5, 6], [5, 5], 3)  # one without drafts
    assert not decode(True, [3, 3], [5, 6], [5, 9], 3)  # three tokens of a prompt


@pytest.mark.parametrize("seqs, budget, most", [(5, 4096, 8), (300, 4096, 512), (64, 100, 100)])
def test_sizes_are_those_that_vllm_captures(seqs, budget, most):
    from vllm.config import CUDAGraphMode, VllmConfig

    config = VllmConfig()
    config.scheduler_config.max_num_seqs = seqs
    config.scheduler_config.max_num_batched_tokens = budget
    config.model_config, graphs = Some(enforce_eager=True), config.compilation_config
    graphs.cudagraph_capture_sizes, graphs.max_cudagraph_capture_size = [], 0
    ours, left = replay.capture_sizes(config), graphs.cudagraph_capture_sizes
    assert config.model_config.enforce_eager and not left
    config.model_config.enforce_eager, graphs.cudagraph_mode = False, CUDAGraphMode.FULL
    graphs.cudagraph_capture_sizes = graphs.max_cudagraph_capture_size = None
    config._set_cudagraph_sizes()
    assert ours == graphs.cudagraph_capture_sizes and {1, 2, 4, 8} <= {*ours} and ours[-1] == most


def test_a_worker_records_the_largest_size_first_after_a_warm_up():
    calls, x = [], torch.zeros(ROWS, 3)
    worker: Any = replay.Replay()
    model = Some(forward=lambda positions, x: calls.append(len(x)) or x + 1)
    run = lambda size: model.forward(positions=x[:size, 0], x=x[:size])  # noqa: E731
    step, parallel = step_of([1]), Some(world_size=1)
    worker.model_runner = Some(model=model, device=Some(type="cpu"), _dummy_run=run, **step)
    worker.vllm_config = config = Some(model_config=Some(enforce_eager=True), lora_config=None)
    config.parallel_config = parallel
    for v2 in (True, False):  # and once more
        assert worker.replay_record(v2, [2, 8, 4]) == {"sizes": [2, 4, 8], "warnings": []}
        assert (
            calls == [8, 8, 4, 4, 2, 2] and hasattr(worker.model_runner, "_may_reorder_batch") == v2
        )
        assert worker.replay_counts() and worker.replay_mode("replay", "poison") == ("run", "graph")
        assert len(run(3)) == 3 and len(calls) == 6
        assert worker.replay_counts() == {"replayed": 1, "python": 0, "problems": []}
        calls.clear()
    worker.vllm_config.model_config.enforce_eager, run = False, worker.replay_record
    assert "refused" in run() and not calls
    config.model_config.enforce_eager, config.lora_config = True, Some()
    assert "refused" in run() and not calls
    config.lora_config = None
    worker.vllm_config.model_config.enforce_eager, parallel.world_size = True, 2
    assert "refused" in run() and not calls
