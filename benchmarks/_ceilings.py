"""What this machine can do at best, measured in the same run: copying, and multiplying matrices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

DEVICE = "cpu"  # set by __main__ before the cases are made


def _best(work: object, rounds: int) -> float:
    assert callable(work)
    best = float("inf")
    for _ in range(rounds):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def copying(nbytes: int) -> Callable[[], object]:
    """``copy_`` into memory that is there, which reads and writes ``nbytes`` in all."""
    source = torch.randn(max(1, nbytes // 8), device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@functools.cache
def matrix_rate() -> float:
    """FLOPs per second of float32 products of 1024 x 1024; best of 20."""
    a = torch.randn(1024, 1024, device=DEVICE)
    return 2 * 1024**3 / _best(lambda: a @ a, 20)
