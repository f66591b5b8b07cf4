"""Every CPU op where its kernels get no memory: a MemoryError, after which the same call gives the same result.

Runs in a process of its own with tests/refused_memory.cpp preloaded (tests/test_native.py starts it), which counts what
genfast._cpu asks for in a call and refuses it from a number of requests on. Each call is made in a new thread, since
kernels keep their working memory for the thread that calls them. Every call is named before it is made, so that one
that ends the process has a name.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from genfast import _backend, _cpu, _registry, _verify
from genfast.models import PixelCNN, PixelCNNPlusPlus

Call = Callable[[], list[Tensor]]

LARGE_BATCH = 600


def address_range(path: str) -> tuple[int, int]:
    """Where a library lies in memory, from its first address to its last."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path)]
    return min(int(first, 16) for first, _ in ranges), max(int(last, 16) for _, last in ranges)


def op_call(op: _registry.Op, sample: _registry.Sample, layout: str, dtype: torch.dtype) -> Call:
    """An op's outputs and gradients on a sample, by the CPU kernels alone."""

    def call() -> list[Tensor]:
        args = _verify._prepared(sample, dtype, "cpu", layout=layout)
        with _backend.backend("cpu"):
            outputs = _verify._outputs(op(*args))
            found = [o for o in outputs if o.requires_grad]
            leaves = [a for a in _registry._tensors(args) if a.requires_grad]
            if not found or not leaves:
                return outputs
            grads = torch.autograd.grad(found, leaves, [torch.ones_like(o) for o in found], allow_unused=True)
        return [*outputs, *(g for g in grads if g is not None)]

    return call


def sampler_call(model: Any, shape: tuple[int, ...], n: int) -> Call:
    uniforms = torch.rand(n, model.uniforms_per_pixel(), *shape[1:])
    return lambda: [model.sample(n, shape, uniforms=uniforms)]


def large_batch(op: _registry.Op, sample: _registry.Sample) -> _registry.Sample | None:
    """The sample with a batch that threads share, where the op takes one."""
    leads = next(i for i in op.tensor_positions if op.kinds[i] != "t")
    first = sample.args[leads]
    if not isinstance(first, Tensor) or first.dim() < 2:
        return None
    alike = [
        i
        for i, a in enumerate(sample.args)
        if isinstance(a, Tensor) and a.dim() >= first.dim() - 1 and a.dim() > 0 and a.shape[0] == first.shape[0]
    ]
    for chosen in (alike, [i for i in alike if sample.args[i].dim() == first.dim()], [leads]):
        made = _verify._taken(sample, 0, LARGE_BATCH, chosen)
        if _verify._accepted(op, made):
            return _registry.Sample(f"{sample.label}, batch of {LARGE_BATCH}", made.args, made.constant)
    return None


def calls() -> Iterator[tuple[str, Call]]:
    for op in _registry.OPS.values():
        if op.samples is None or "cpu" not in op.kernels:
            continue
        samples = list(op.samples(torch.Generator().manual_seed(0)))
        for sample in samples:
            yield f"{op.name}, {sample.label}", op_call(op, sample, "dense", torch.float32)
        for sample, layout in _verify.odd(op, samples):
            yield f"{op.name}, {sample.label}", op_call(op, sample, layout, torch.float32)
        for sample in samples[:: max(1, len(samples) // 3)]:
            if (large := large_batch(op, sample)) is not None:
                yield f"{op.name}, {large.label}", op_call(op, large, "dense", torch.float32)
    yield "pixel_program, one image", sampler_call(PixelCNN(1, 48, 2, 7, 8), (1, 12, 28), 1)  # whose rows threads share
    yield "pixel_program, images", sampler_call(PixelCNN(1, 8, 2, 5, 5), (1, 4, 5), 5)
    yield "pixel_program, mixtures", sampler_call(PixelCNNPlusPlus(1, 8, 1, 3), (1, 8, 8), 3)


class Refusal:
    """The preloaded library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._refuse = self._library.refuse_memory
        self._refuse.argtypes, self._refuse.restype = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_long), None
        self._library.requests_for_memory.restype = ctypes.c_long
        self._range = address_range(_cpu.__file__)

    def run(self, call: Call, granted: int) -> tuple[list[Tensor] | MemoryError, int, list[Tensor]]:
        """The call's result or MemoryError with so many requests granted, how many there were, and the result of the
        same call after that."""
        results: list[Any] = []

        def work() -> None:
            torch.set_num_threads(2)
            try:
                self._refuse(*self._range, granted)
                try:
                    results.append(call())
                except MemoryError as error:
                    results.append(error.with_traceback(None))
                finally:
                    results.append(self._library.requests_for_memory())
                    self._refuse(0, 0, 0)
                results.append(call())
            except BaseException as error:
                results[:] = [error]

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if len(results) != 3:
            raise results[0]
        return results[0], results[1], results[2]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(f.detach().nan_to_num(), e.detach().nan_to_num()) for f, e in zip(found, expected)
    )


def main() -> None:
    torch.manual_seed(0)
    refusal = Refusal()
    failed: set[str] = set()
    refused = 0
    for name, call in calls():
        print(name, flush=True)
        try:
            call()  # what Python keeps from the first call is made
        except _backend.BackendError:
            continue
        everything, requests, expected = refusal.run(call, sys.maxsize)
        assert not isinstance(everything, MemoryError), f"{name}: {everything}"
        assert equal(everything, expected), f"{name}: two calls differ"
        # Some calls make as many requests as a batch has entries, all alike.
        for granted in sorted({*range(min(requests, 24)), *range(0, requests, max(1, requests // 8))}):
            found, _, again = refusal.run(call, granted)
            if isinstance(found, MemoryError):
                failed.update(re.findall(r"genfast kernel (\w+): its working memory", str(found)))
                refused += 1
            else:
                assert equal(found, expected), f"{name}: with {granted} requests granted the result is another"
            assert equal(again, expected), f"{name}: after {granted} requests granted the result is another"
    print(f"{refused} requests refused to {', '.join(sorted(failed))}", flush=True)


if __name__ == "__main__":
    main()
