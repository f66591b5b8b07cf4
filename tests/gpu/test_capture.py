"""CUDA graphs and streams: every op, layer, sampler and training step is captured, keeps to the current stream, waits
for nothing and takes memory from PyTorch's allocator alone.

The same calls run on fake CUDA tensors, with no GPU, in tests/kernels/test_fake_cuda.py.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import genfast
from tests.conftest import SAMPLES
from tests.kernels.capture_cases import CASES, of_sample

# An op has one backend or two on a GPU; each is captured.
CALLS = {
    f"{op.name}, {sample.label}, {backend}": (
        backend,
        lambda device, op=op, sample=sample: of_sample(op, sample, device),
    )
    for op, sample in SAMPLES
    for backend in ("triton", "cuda")
    if backend in op.kernels
} | {name: (None, build) for name, build in CASES.items()}
each_call = pytest.mark.parametrize("label", CALLS)


@contextlib.contextmanager
def forbidden_to_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def built(label, device="cuda"):
    """(backend, case), the case run until all its tables and kernels are there, on a stream of its own as a capture
    asks."""
    backend, build = CALLS[label]
    torch.manual_seed(0)
    case = build(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), genfast.backend(backend):
        for _ in range(2):
            case.run(*case.inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return backend, case


def other(t):
    """Other values that mean as much: another order, and floating ones nearer to zero."""
    return t.flip(0) * 0.9 if t.is_floating_point() else t.flip(0)


def eager(case, backend, inputs):
    """What a plain call gives; random numbers and whatever it changes are as before it."""
    kept = [t.clone() for t in case.state]
    torch.cuda.manual_seed(1)
    with genfast.backend(backend):
        expected = [t.clone() for t in case.run(*inputs)]
    for t, before in zip(case.state, kept):
        t.copy_(before)
    torch.cuda.synchronize()
    return expected


def close(found, expected):
    assert len(found) == len(expected) > 0
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5, equal_nan=True)  # a library may take another algorithm


@each_call
def test_a_replay_is_what_eager_gives(label):
    backend, case = built(label)
    static = [t.clone() for t in case.inputs]
    fresh = [other(t) for t in case.inputs]
    graph = torch.cuda.CUDAGraph()
    kept = [t.clone() for t in case.state]
    with genfast.backend(backend), torch.cuda.graph(graph):
        found = case.run(*static)
    expected = eager(case, backend, fresh)
    for t in found:
        t.zero_()  # so that the replay is what writes them
    for t, values in zip((*static, *case.state), (*fresh, *kept)):
        t.copy_(values)
    torch.cuda.manual_seed(1)
    graph.replay()
    torch.cuda.synchronize()
    close(found, expected)


@each_call
def test_the_current_stream_is_used_and_nothing_waits(label):
    """New values are copied in behind a long kernel on a side stream: whatever ran elsewhere, or before, saw the old
    ones."""
    backend, case = built(label)
    static = [t.clone() for t in case.inputs]
    fresh = [other(t) for t in case.inputs]
    expected = eager(case, backend, fresh)
    torch.cuda.manual_seed(1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), genfast.backend(backend), forbidden_to_wait():
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        for t, values in zip(static, fresh):
            t.copy_(values)
        found = case.run(*static)
    torch.cuda.synchronize()
    close(found, expected)


@pytest.mark.parametrize("label", [*CASES, *(label for label in CALLS if label.endswith(", cuda"))])
def test_memory_comes_from_pytorchs_allocator(label):
    """What the device has given away is what the allocator holds."""
    backend, case = built(label)
    torch.cuda.synchronize()
    outside = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    with genfast.backend(backend):
        for _ in range(3):
            case.run(*case.inputs)
            torch.cuda.synchronize()
            assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() == outside


@each_call
def test_another_device_than_the_current_one(label):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: one is visible")
    backend, case = built(label)
    expected = eager(case, backend, case.inputs)
    backend, case = built(label, "cuda:1")
    with genfast.backend(backend):
        found = case.run(*(t.to("cuda:1") for t in case.inputs))
    assert {t.device for t in found} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    if not case.state:
        close([t.to("cuda:0") for t in found], expected)
