"""What this machine can do at best, measured in the same run: copying, multiplying matrices, and multiply-adds in registers."""

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


@functools.cache
def fma_rate() -> float:
    """FLOPs per second of float32 multiply-adds that touch no memory, on all threads; best of 20. 0 where it is not known."""
    if DEVICE != "cpu":
        return 0.0
    from genfast import _cpu

    threads, rounds = torch.get_num_threads(), 1 << 20
    out = torch.empty(16 * threads)
    flops: float = _cpu.fma_rate(False, out.data_ptr(), 1, threads) * rounds
    return flops / _best(lambda: _cpu.fma_rate(False, out.data_ptr(), rounds, threads), 20)
