"""What this machine can do at best, measured in the same run: copying, and multiplying matrices."""

from __future__ import annotations

import functools
import time

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


@functools.cache
def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by ``copy_`` into memory that is there, ``nbytes`` moved in all; best of 30.

    The size matters: what fits into a cache is copied several times faster than what does not.
    """
    source = torch.randn(max(1, nbytes // 8), device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * source.numel() / _best(lambda: target.copy_(source), 30)


@functools.cache
def matrix_rate() -> float:
    """FLOPs per second of float32 products of 1024 x 1024; best of 20."""
    a = torch.randn(1024, 1024, device=DEVICE)
    return 2 * 1024**3 / _best(lambda: a @ a, 20)
