"""The contract where it takes a GPU to break it: CUDA graphs, two devices, micro-batches."""

from __future__ import annotations

import threading

import pytest
import torch

from .bare_models import CLASSES, HIDDEN, LEVELS, ROWS, load, make, payload, run_forward, stack
from .test_steps import one_process

__all__ = ["one_process"]
bites = pytest.mark.bites
pytestmark = pytest.mark.gpu


@pytest.fixture(params=CLASSES)
def model(request, one_process):
    return make(load(request.param), device="cuda")


def capture(model, tokens: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a step, and what it copies from the decoder's inputs when it is replayed."""
    seen = torch.full((LEVELS, tokens, HIDDEN), -1.0, device="cuda")

    def during(step):
        for level, tensor in enumerate(step.tensors.values()):
            seen[level].copy_(tensor)

    model.language_model.decoder.during = during
    run_forward(model, tokens, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_forward(model, tokens, device="cuda")
    return graph, seen


def replay(graph: torch.cuda.CUDAGraph, seen: torch.Tensor) -> torch.Tensor:
    seen.fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    return seen.cpu()


@bites("stock")
def test_graph_captured_without_a_payload_takes_one(model):
    """D1."""
    graph, seen = capture(model, 4)
    model._set_deepstack_input_embeds(payload(4).cuda())
    assert replay(graph, seen).equal(payload(4))


@bites("stock", "pr43617")
def test_replayed_payload_is_gone_at_the_next_step(model):
    """D2."""
    graph, seen = capture(model, 1)
    model._set_deepstack_input_embeds(payload(1).cuda())
    replay(graph, seen)
    model.language_model.decoder.embed_input_ids.cuda()
    model.embed_input_ids(torch.tensor([3], device="cuda"))
    assert replay(graph, seen).eq(0).all()


@bites("stock", "pr43617")
def test_graph_captured_before_growing_goes_on(model):
    """D4, D5."""
    graph, seen = capture(model, 4)
    model._set_deepstack_input_embeds(payload(3).cuda())
    model._get_deepstack_input_embeds(ROWS + 1)
    assert replay(graph, seen)[:, :3].equal(payload(3))
    model._set_deepstack_input_embeds(payload(2 * ROWS, seed=1).cuda())
    assert replay(graph, seen).equal(payload(2 * ROWS, seed=1)[:, :4])


@bites("stock", "pr43617")
def test_graph_reads_nothing_of_a_longer_payload(model):
    """D6."""
    graph, seen = capture(model, 6)
    model._set_deepstack_input_embeds(payload(6, seed=1).cuda())
    model._set_deepstack_input_embeds(payload(2).cuda())
    assert replay(graph, seen)[:, :2].equal(payload(2))
    assert replay(graph, seen)[:, 2:].eq(0).all()


@bites("stock", "pr43617")
@pytest.mark.parametrize("module", CLASSES)
def test_buffers_follow_the_decoder_to_the_gpu(module, one_process):
    """D7."""
    model = make(load(module))
    seen = []
    model.language_model.decoder.during = lambda step: seen.append(stack(step).clone())
    model._set_deepstack_input_embeds(payload(3))
    run_forward(model, 5, device="cuda", dtype=torch.bfloat16)
    model._set_deepstack_input_embeds(payload(5).cuda())
    run_forward(model, 5, device="cuda", dtype=torch.bfloat16)
    assert seen[0].is_cuda and seen[1].is_cuda
    assert seen[0][:, :3].cpu().equal(payload(3).bfloat16())
    assert seen[1].cpu().equal(payload(5).bfloat16())


@bites("stock", "pr43617")
def test_micro_batches_overlap(model):
    """D9, in vLLM's own threads, contexts and streams; each yields before it reads."""
    from vllm.v1.worker import ubatching

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

    model.language_model.decoder.during = during
    model._set_deepstack_input_embeds(payload(7).cuda())
    threads = [threading.Thread(target=micro_batch, args=args) for args in zip(contexts, (3, 4))]
    for thread in threads:
        thread.start()
    contexts[0].ready_barrier.wait()
    contexts[0].cpu_wait_event.set()
    for thread in threads:
        thread.join(60)
    assert seen[0].cpu().equal(payload(7)[:, :3])
    assert seen[1].cpu().equal(payload(7)[:, 3:])
