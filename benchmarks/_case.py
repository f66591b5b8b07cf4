"""What a benchmark is: a case, its providers side by side, and what must be moved and multiplied at the least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import _ceilings
from genfast._memory import peak_bytes

Work = Callable[[], Any]
PROVIDERS = ("reference", "compile", "trick", "peer", "floor", "genfast")


@dataclass(frozen=True)
class Case:
    """One comparison.

    providers: by name, a function that makes the work to time: a call without arguments that returns tensors (outputs and
        gradients; they are compared with the reference's before anything is timed) or None (a training step). "floor" is the
        library calls that any form of the work must make, and no form of it: it is timed beside the others and not compared.
    bytes, flops: what the work cannot do without; 0 where that is not a useful figure.
    quick: whether it runs under --quick.
    once: providers that take minutes: timed at one call, the one whose result is compared, and without their memory.
    pause: seconds before each timed call, where a provider's threads spin on after it in a pool of their own (numpy's).
    """

    name: str
    providers: dict[str, Callable[[], Work]]
    bytes: int = 0
    flops: int = 0
    quick: bool = True
    tolerance: float = 1e-3
    notes: dict[str, str] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    pause: float = 0.0


def measure(case: Case, rounds: int, budget: float) -> dict[str, Any]:
    """Times the providers in turn, round by round, so that a drift of the machine meets all alike."""
    torch.manual_seed(0)
    works = {name: make() for name, make in case.providers.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    expected: list[Tensor | None] = []
    for name, work in works.items():
        start = time.perf_counter()
        found_here = _flat(work())
        times[name] = [time.perf_counter() - start] * (name in case.once)
        expected = found_here if name == "reference" else expected
        if name != "floor":
            _compare(case, name, found_here, expected)
        if name not in case.once:
            work()
    copying = _ceilings.copying(case.bytes) if case.bytes else None
    copies: list[float] = []
    start = time.perf_counter()
    while len(times["genfast"]) < rounds and (len(times["genfast"]) < 5 or time.perf_counter() - start < budget):
        for name, work in works.items():
            if name not in case.once:
                time.sleep(case.pause)
                times[name].append(_timed(work))
        if copying is not None:  # the ceiling takes its turn too, and meets the caches in the state that the others do
            copies.append(_timed(copying))
    peaks = {
        name: None if name in case.once else peak_bytes(work, _ceilings.DEVICE) - getattr(work, "gradient_bytes", 0)
        for name, work in works.items()
    }
    copy = case.bytes / statistics.median(copies) if copies else 0.0
    rate = _ceilings.matrix_rate() if case.flops else 0.0
    peak_rate = _ceilings.fma_rate() if case.flops else 0.0
    ours = statistics.median(times["genfast"])
    floor = statistics.median(times["floor"]) if "floor" in times else 0.0
    found: dict[str, Any] = {
        "case": case.name, "bytes": case.bytes, "flops": case.flops, "copy_bandwidth": copy, "matrix_rate": rate,
        "fma_rate": peak_rate, "notes": case.notes, "providers": {},
    }  # fmt: skip
    for name, values in times.items():
        median = statistics.median(values)
        quarter = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
        found["providers"][name] = {
            "median_s": median, "min_s": min(values), "iqr_s": quarter[2] - quarter[0], "rounds": len(values),
            "peak_bytes": peaks[name], "times_genfast": median / ours,
            "share_of_copy": case.bytes / median / copy if copy else None,
            "share_of_matrix_rate": case.flops / median / rate if rate else None,
            "share_of_fma_rate": case.flops / median / peak_rate if peak_rate else None,
            "share_of_floor": floor / median if floor else None,
        }  # fmt: skip
    return found


def _timed(work: Work) -> float:
    if _ceilings.DEVICE == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _flat(result: Any) -> list[Tensor | None]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Sequence) and any(r is None for r in result):
        return list(result)
    return [t for part in result for t in _flat(part)] if isinstance(result, Sequence) else []


def _compare(case: Case, name: str, found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    if len(found) != len(expected):
        raise AssertionError(f"{case.name}: {name} returned {len(found)} tensors, the reference {len(expected)}")
    for i, (f, e) in enumerate(zip(found, expected)):
        if f is None or e is None:  # what a provider has in another form
            continue
        error = float((f.detach().double() - e.detach().double()).norm() / e.detach().double().norm().clamp_min(1e-30))
        if not error <= case.tolerance:
            raise AssertionError(f"{case.name}: {name} differs from the reference by {error:.1e} in output {i}")


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients for fixed cotangents, which cost no pass of their own."""
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]
