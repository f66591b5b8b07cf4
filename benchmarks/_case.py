"""What a benchmark is: a case, its providers side by side, and what must be moved and multiplied at the least."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import _ceilings
from genfast._peak_memory import peak_bytes

Work = Callable[[], Any]
PROVIDERS = ("reference", "compile", "trick", "peer", "graph", "floor", "genfast")
# How far a provider may be from the reference, by how its products are taken.
TOLERANCES = {"float32": 1e-3, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}
SMALL = 2e-3  # seconds: a GPU's work below this is also timed as a CUDA graph, and by many calls in a row


@dataclass(frozen=True)
class Case:
    """One comparison.

    providers: by name, a function that makes the work to time: a call without arguments that returns tensors (outputs
        and gradients; they are compared with the reference's before anything is timed) or None (a training step).
        "floor" is the library calls that any form of the work must make, and no form of it: it is timed beside the
        others and not compared. Where ``bytes`` are given, on a GPU a function is called several times, and makes
        inputs of its own each time: they are used in turn, so that none is found in the L2 cache. A work with an
            attribute ``part``, a pair, is that many of so
        many like steps, and its time stands for all of them. A name of several words is another form of its first word.
    bytes, flops: what the work cannot do without; 0 where that is not a useful figure. FLOPs that take long to count
        may be a function.
    quick: whether it runs under --quick.
    tolerance: TOLERANCES' of the dtype without.
    once: providers that take minutes: timed at one call, the one whose result is compared, and without their memory.
    pause: seconds before each timed call, where a provider's threads spin on after it in a pool of their own (numpy's).
    dtype: a name among _ceilings.DTYPES: how products are taken, and which matrix rate is the bound.
    priority: cases of a lower one run first, and those of a higher are left out where time is up.
    op: the file that it comes from; filled in when the cases are gathered.
    """

    name: str
    providers: dict[str, Callable[[], Work]]
    bytes: int = 0
    flops: int | Callable[[], int] = 0
    quick: bool = True
    tolerance: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    pause: float = 0.0
    dtype: str = "float32"
    priority: int = 1
    op: str = ""


class _Rotation:
    """A provider's works, one after another: the same calls on inputs that lie elsewhere."""

    def __init__(self, make: Callable[[], Work], first: Work, count: int) -> None:
        self.works = [first, *(make() for _ in range(count - 1))]
        self.turn = itertools.cycle(self.works)
        self.part: tuple[int, int] = getattr(first, "part", (1, 1))
        self.calls = count

    def __call__(self) -> Any:
        return next(self.turn)()

    def timed(self) -> float:
        return _ceilings.seconds(self, self.calls) * self.part[1] / self.part[0]

    def settle(self) -> None:
        """Warms every work up; short ones are timed by so many calls that a launch's and an event's jitter are
        small."""
        for work in self.works:
            work()
        if _ceilings.DEVICE == "cuda":
            once = _ceilings.seconds(self, self.calls)
            self.calls = min(256, max(self.calls, math.ceil(SMALL / max(once, 1e-9))))


def measure(case: Case, rounds: int, budget: float, *, compiled: bool = True, cap: float = math.inf) -> dict[str, Any]:
    """Times the providers in turn, round by round, so that a drift of the machine meets all alike.

    Args:
        case: what to compare.
        rounds: at most; fewer, but at least five, in ``budget`` seconds, and fewer still where those took three times
            as long.
        budget: seconds for the rounds.
        compiled: whether the providers of torch.compile take part.
        cap: seconds after which no further provider but genfast is prepared.

    Raises:
        AssertionError: genfast's numbers are not the reference's. Another provider's is named under "absent".
        Exception: whatever the reference and genfast raise, but for a lack of memory, which is told under "absent".
    """
    with _ceilings.products(case.dtype):
        return _measure(case, rounds, budget, compiled, cap)


def _measure(case: Case, rounds: int, budget: float, compiled: bool, cap: float) -> dict[str, Any]:
    begun = time.perf_counter()
    clocks = [_ceilings.clocks()]
    torch.manual_seed(0)
    works, times, absent = _prepared(case, compiled, begun + cap)
    graphs: dict[str, Work] = {}
    uncaptured: dict[str, str] = {}
    for name, rotation in works.items() if _ceilings.DEVICE == "cuda" else ():
        if rotation.part == (1, 1) and name not in case.once and rotation.timed() < SMALL:
            try:
                graphs[name] = captured(rotation.works)
            except RuntimeError as error:  # it waits for the device, or its optimiser is not made for graphs
                uncaptured[name] = _first_line(error)
    # A GPU's copy leaves its caches behind whatever the size, so that it is measured once; a CPU's meets them as the
    # case does.
    copying = _ceilings.copying(case.bytes) if case.bytes and _ceilings.DEVICE == "cpu" else None
    copies: list[float] = []
    replays: dict[str, list[float]] = {name: [] for name in graphs}
    start = time.perf_counter()
    done = 0
    while works and done < rounds:
        spent = time.perf_counter() - start
        if spent > budget and (done >= 5 or (done and spent > 3 * budget)):
            break
        done += 1
        for name, rotation in works.items():
            if name not in case.once:
                time.sleep(case.pause)
                times[name].append(rotation.timed())
        for name, graph in graphs.items():
            replays[name].append(_ceilings.seconds(graph, 3) / len(works[name].works))
        if copying is not None:  # the ceiling takes its turn too, and meets the caches in the state that the others do
            copies.append(_ceilings.seconds(copying))
    graphs.clear()
    peaks = {
        name: None
        if name in case.once
        else peak_bytes(rotation.works[0], _ceilings.DEVICE) - getattr(rotation.works[0], "gradient_bytes", 0)
        for name, rotation in works.items()
    }
    clocks.append(_ceilings.clocks())
    copy = case.bytes / statistics.median(copies) if copies else 0.0
    if case.bytes and _ceilings.DEVICE == "cuda":
        copy = _ceilings.copy_bandwidth()
    flops = case.flops() if callable(case.flops) else case.flops
    rate = _ceilings.matrix_rate(case.dtype) if flops else 0.0
    peak_rate = _ceilings.fma_rate() if flops and case.dtype == "float32" else 0.0
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours, floor = medians.get("genfast"), medians.get("floor")
    replayed = {name: statistics.median(values) for name, values in replays.items()}
    found: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "dtype": case.dtype,
        "bytes": case.bytes,
        "flops": flops,
        "copy_bandwidth": copy,
        "matrix_rate": rate,
        "fma_rate": peak_rate,
        "notes": case.notes,
        "providers": {},
        "absent": absent,
    }
    if _ceilings.DEVICE == "cuda":
        found |= {
            "sets": max((len(r.works) for r in works.values()), default=0),
            "clocks": clocks,
            "uncaptured": uncaptured,
        }
    for name, values in times.items():
        median = medians[name]
        quarter = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
        found["providers"][name] = {
            "median_s": median,
            "min_s": min(values),
            "iqr_s": quarter[2] - quarter[0],
            "rounds": len(values),
            "peak_bytes": peaks[name],
            "times_genfast": median / ours if ours else None,
            "share_of_copy": case.bytes / median / copy if copy else None,
            "share_of_matrix_rate": flops / median / rate if rate else None,
            "share_of_fma_rate": flops / median / peak_rate if peak_rate else None,
            "share_of_floor": floor / median if floor else None,
        }
        if name in replayed:
            found["providers"][name]["graph_s"] = replayed[name]
        if works[name].part != (1, 1):
            found["providers"][name]["part"] = list(works[name].part)
    return found


def _prepared(
    case: Case, compiled: bool, until: float
) -> tuple[dict[str, _Rotation], dict[str, list[float]], dict[str, str]]:
    """The providers that work, warm, by name; their first times where these are all; and why the others are not
    there."""
    works: dict[str, _Rotation] = {}
    times: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    expected: list[Tensor | None] | None = None
    count = _ceilings.sets(case.bytes)
    for name, make in case.providers.items():
        if name.startswith("compile") and not compiled:
            continue
        if name != "genfast" and expected is not None and time.perf_counter() > until:
            absent[name] = "left out: the case's time was up"
            continue
        try:
            work = make()
            took, found = _first_call(work)
            if name != "floor":
                expected = found if expected is None else expected
                _compare(case, name, found, expected)
            rotation = _Rotation(make, work, 1 if name in case.once else count)
            if name not in case.once:
                rotation.settle()
            works[name], times[name] = rotation, [took * rotation.part[1] / rotation.part[0]] * (name in case.once)
        except Exception as error:
            if _out_of_memory(error):
                absent[name] = "out of memory"
            elif name in ("reference", "genfast"):
                raise
            else:
                absent[name] = f"failed: {_first_line(error)}"
        finally:
            work = rotation = found = None  # type: ignore[assignment]  # what failed is held no longer
        if name in absent:
            _release()
    expected = None
    if _ceilings.DEVICE == "cuda":
        _release()
    return works, times, absent


def _first_call(work: Work) -> tuple[float, list[Tensor | None]]:
    found: list[Tensor | None] = []
    took = _ceilings.seconds(lambda: found.extend(_flat(work())))
    return took, found


def captured(works: Sequence[Work]) -> Work:
    """One call of each as a CUDA graph, and what replays it.

    Raises:
        RuntimeError: a work waits for the device, or torch does not allow what it does in a graph.
    """
    mode = torch.cuda.get_sync_debug_mode()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    try:
        # Before the capture, which an error in it would leave in disorder: does anything wait for the device?
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(aside):
            works[0]()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    return graph.replay


def _release() -> None:
    gc.collect()
    if _ceilings.DEVICE == "cuda":
        torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    # torch's allocator for CPUs raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: can't allocate" in str(
        error
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _flat(result: Any) -> list[Tensor | None]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Sequence) and any(r is None for r in result):
        return list(result)
    return [t for part in result for t in _flat(part)] if isinstance(result, Sequence) else []


def _compare(case: Case, name: str, found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    tolerance = TOLERANCES[case.dtype] if case.tolerance is None else case.tolerance
    if len(found) != len(expected):
        raise AssertionError(f"{case.name}: {name} returned {len(found)} tensors, the reference {len(expected)}")
    for i, (f, e) in enumerate(zip(found, expected)):
        if f is None or e is None:  # what a provider has in another form
            continue
        if f.shape != e.shape:
            raise AssertionError(
                f"{case.name}: {name}'s output {i} has shape {tuple(f.shape)}, expected {tuple(e.shape)}"
            )
        error = float((f.detach().double() - e.detach().double()).norm() / e.detach().double().norm().clamp_min(1e-30))
        if not error <= tolerance:
            raise AssertionError(f"{case.name}: {name} differs from the reference by {error:.1e} in output {i}")


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients for fixed cotangents, which cost no pass of their own."""
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]
