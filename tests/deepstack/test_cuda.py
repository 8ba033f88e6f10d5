"""The contract where it takes a GPU to break it: CUDA graphs and micro-batches."""

from __future__ import annotations

import threading

import pytest
import torch

from .bare_models import (
    ALL,
    HIDDEN,
    LEVELS,
    ROWS,
    SHARED,
    TEXT,
    embed,
    embeddings_of,
    levels_of,
    make,
    medium,
    payload,
    run_forward,
    stack,
)

bites = pytest.mark.bites
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]


def on_gpu(name: str):
    model = make(name, device="cuda")
    model.language_model.cuda()
    return model


def capture(model, tokens: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a step, and what it copies from the decoder's inputs when it is replayed."""
    seen = torch.zeros(LEVELS, tokens, HIDDEN, device="cuda")

    def during(step):
        if step is not None:
            for level, tensor in enumerate(step.tensors.values()):
                seen[level].copy_(tensor[:tokens])

    model.language_model.model.during = during
    run_forward(model, tokens, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_forward(model, tokens, device="cuda")
    return graph, seen


def replay(graph: torch.cuda.CUDAGraph, seen: torch.Tensor) -> torch.Tensor:
    graph.replay()
    torch.cuda.synchronize()
    return seen.cpu()


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("granite4_vision", "moss_audio")
        else pytest.param(name, marks=bites("stock"))
        for name in ALL
    ],
)
def test_graph_captured_without_a_payload_takes_one(name):
    """D1."""
    model = on_gpu(name)
    graph, seen = capture(model, 4)
    embeddings = embeddings_of(name, 3, 1)
    embed(model, [TEXT, *[medium(name)] * 3], [embeddings.cuda()])
    staged = replay(graph, seen)
    assert staged[:, 1:].equal(levels_of(embeddings)) and staged[:, 0].eq(0).all()


@pytest.mark.parametrize(
    "name",
    [
        name if name == "moss_audio" else pytest.param(name, marks=bites("pr43617", "newest"))
        for name in ALL
    ],
)
def test_replayed_payload_is_gone_at_the_next_step(name):
    """D2."""
    model = on_gpu(name)
    graph, seen = capture(model, 2)
    embed(model, [medium(name)] * 2, [embeddings_of(name, 2, 1).cuda()])
    assert replay(graph, seen).ne(0).any()
    embed(model, [TEXT], [])
    assert replay(graph, seen).eq(0).all()


@bites("stock", "pr43617", "newest")
@pytest.mark.parametrize("name", SHARED)
def test_micro_batches_overlap(name):
    """D9, in vLLM's own threads, contexts and streams; each yields before it reads."""
    from vllm.v1.worker import ubatching

    model = on_gpu(name)
    stream = torch.cuda.current_stream()
    contexts = ubatching.make_ubatch_contexts(
        num_micro_batches=2,
        compute_stream=stream,
        comm_stream=torch.cuda.Stream(),
        forward_contexts=[object(), object()],  # nothing here looks into them
        ready_barrier=threading.Barrier(3),
    )
    seen = {}

    def during(step):
        ubatching.dbo_yield()
        seen[ubatching.dbo_current_ubatch_id()] = stack(step).clone()

    def micro_batch(context, tokens):
        torch.cuda.set_stream(stream)
        with context:
            run_forward(model, tokens, device="cuda")

    model.language_model.model.during = during
    model._set_deepstack_input_embeds(payload(ROWS - 1).cuda())
    threads = [threading.Thread(target=micro_batch, args=args) for args in zip(contexts, (3, 4))]
    for thread in threads:
        thread.start()
    contexts[0].ready_barrier.wait()
    contexts[0].cpu_wait_event.set()
    for thread in threads:
        thread.join(60)
    assert seen[0].cpu().equal(payload(7)[:, :3])
    assert seen[1].cpu().equal(payload(7)[:, 3:])
