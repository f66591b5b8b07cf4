"""Peak memory of a piece of work, for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _allocator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The profiler tells of its own start and stop on standard error, below Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that ``work()`` held at once beyond what was allocated before, exact: from the allocator's own
    events."""
    _allocator.clear()  # memory that is used again is memory that was asked for
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    held = peak = 0
    results = profile.profiler.kineto_results.events() if profile.profiler else []
    for event in sorted((e for e in results if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
