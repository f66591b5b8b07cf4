"""What this machine can do at best, measured in the same run: copying, multiplying matrices, and multiply-adds in
registers."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEVICE = "cpu"  # set by test_cases before the cases are made
# How the products of a case are taken, and the type of its tensors: "tf32" is float32 rounded to ten bits for each
# product.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
COPIED = 2**30  # bytes of each of the two buffers of the copy on a GPU, many times any L2 cache


@contextlib.contextmanager
def products(dtype: str) -> Iterator[None]:
    """Within the block cuBLAS, cuDNN and our kernels take float32 products in TF32 if ``dtype`` says so, and else in
    full.

    cuDNN chooses among its algorithms by trying them, which makes the strongest rival.
    """
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark
    matmul.allow_tf32 = convolution.allow_tf32 = dtype == "tf32"
    convolution.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark = before


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """The time of ``calls`` calls in a row, one: between two events on a GPU, which the host does not wait for in
    between."""
    if DEVICE == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def copying(nbytes: int) -> Callable[[], object]:
    """``copy_`` into memory that is there, which reads and writes ``nbytes`` in all."""
    source = torch.randn(max(1, nbytes // 8), device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of a gigabyte on a GPU, whose caches it leaves behind; median of
    20."""
    work = copying(2 * COPIED)
    seconds(work, 3)
    return 2 * COPIED / statistics.median(seconds(work) for _ in range(20))


@functools.cache
def matrix_rate(dtype: str = "float32") -> float:
    """FLOPs per second of products of random matrices: 8192 x 8192 on a GPU, median of 10; 1024 x 1024 on a CPU, best
    of 20."""
    size = SIZES[DEVICE]
    a, b = (torch.randn(size, size, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    with products(dtype):
        seconds(lambda: a @ b, 3)
        times = [seconds(lambda: a @ b) for _ in range(10 if DEVICE == "cuda" else 20)]
    return 2 * size**3 / (statistics.median(times) if DEVICE == "cuda" else min(times))


@functools.cache
def fma_rate() -> float:
    """FLOPs per second of float32 multiply-adds that touch no memory, on all threads; best of 20. 0 where it is not
    known."""
    if DEVICE != "cpu":
        return 0.0
    from genfast import _cpu

    threads, rounds = torch.get_num_threads(), 1 << 20
    out = torch.empty(16 * threads)
    flops: float = _cpu.fma_rate(out=out, rounds=1, threads=threads) * rounds
    return flops / min(seconds(lambda: _cpu.fma_rate(out=out, rounds=rounds, threads=threads)) for _ in range(20))


def sets(nbytes: int) -> int:
    """How many sets of inputs, used in turn, leave none of one in a GPU's L2 cache when it is used again.

    ``nbytes`` is what one call moves. Four times the cache passes between two uses of a set; a call that moves so much
    itself needs no second. At most 64.
    """
    if DEVICE != "cuda" or not nbytes:
        return 1
    passing = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return 1 if nbytes >= passing else min(64, 1 + math.ceil(passing / nbytes))


def clocks() -> dict[str, float] | None:
    """The GPU's clocks in MHz, temperature in degrees and power in watts, read and never set; None where they cannot
    be."""
    tool = shutil.which("nvidia-smi")
    if DEVICE != "cuda" or tool is None:
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", "")
    # MIG and containers may hide the identifier; without one the tool tells of every GPU, and the first line is taken.
    chosen = ["-i", f"GPU-{uuid}"] if uuid else []
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *chosen]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(fields, (float(value) for value in said.splitlines()[0].split(","))))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def measured() -> dict[str, Any]:
    """All of them at once, for the head of the results."""
    if DEVICE != "cuda":
        return {"matrix_rate": {"float32": matrix_rate()}, "fma_rate": fma_rate()}
    before = clocks()
    found: dict[str, Any] = {
        "copy_bandwidth": copy_bandwidth(),
        "matrix_rate": {dtype: matrix_rate(dtype) for dtype in ("float32", "tf32", "bfloat16")},
        "l2_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
    }
    return found | {"clocks": {"before": before, "after": clocks()}}
