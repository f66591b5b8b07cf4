"""``python -m benchmarks.tune``: tries the launch choices of the kernels on this GPU, at the sizes of the goals.

A kernel file names its choices in TUNABLE; the sweeps of _tune_memory.py and _tune_matrix.py say what each is tried on.
All candidates are compiled first, on every core; those that spill are left out. Then, size by size, each candidate's
results are held to those of the present choice, into outputs that were poisoned, and it is timed: replays of a CUDA
graph over inputs in turn, the median of ten. What is found goes to a JSON file after each case; the person reads the
table and edits TUNABLE.

``--list`` prints the sweeps; ``--dry-run`` compiles every candidate for sm_90 and reports spills. Both need no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from genfast.kernels._common import Choice

Work = Callable[[], Any]
FILES = ("benchmarks._tune_memory", "benchmarks._tune_matrix")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROTATED = 1 << 28  # bytes that the inputs in turn have at the least, several times any second cache of today
TINY = "tiny"


@dataclass(frozen=True)
class Job:
    """A piece of work to time: a call without arguments that returns tensors, and what it cannot do without."""

    work: Work
    bytes: int = 0
    flops: int = 0


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Sweep:
    """What one choice of one kernel file is tried on.

    family, choice: the kernel file, and the name in its TUNABLE.
    make: from a size, a dtype and a device, a job on fresh random inputs.
    sizes: by label; "tiny" is for the tests, and is not timed.
    tolerance: of a candidate's results against the present choice's, where that of the dtype does not do.
    """

    family: str
    choice: str
    make: Callable[[Any, torch.dtype, str], Job]
    sizes: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    tolerance: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}.{self.choice}"

    @property
    def tunable(self) -> Choice:
        found: Choice = importlib.import_module(f"genfast.kernels.{self.family}").TUNABLE[self.choice]
        return found

    def candidates(self, dtype: torch.dtype) -> list[dict[str, int]]:
        """The present choice, then the others."""
        now = self.tunable.of(dtype.itemsize)
        return [now, *(c for c in self.tunable.candidates if {**now, **c} != now)]


@dataclass(frozen=True)
class Case:
    """A sweep at one size and dtype."""

    sweep: Sweep
    label: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.sweep.name}, {self.label}, {named(self.dtype)}"

    @property
    def candidates(self) -> list[dict[str, int]]:
        return self.sweep.candidates(self.dtype)

    def make(self, device: str) -> Job:
        return self.sweep.make(self.sweep.sizes[self.label], self.dtype, device)


def sweeps(names: Sequence[str] = ()) -> list[Sweep]:
    """All sweeps, or those of the families (``affine_coupling``) or choices (``affine_coupling.forward``) named.

    Raises ValueError where a name is nobody's.
    """
    found: list[Sweep] = [s for file in FILES for s in importlib.import_module(file).SWEEPS]
    known = {s.family for s in found} | {s.name for s in found}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"--op: {', '.join(unknown)}: expected {', '.join(sorted(known))}")
    return [s for s in found if not names or {s.family, s.name} & set(names)]


def cases(found: Sequence[Sweep]) -> list[Case]:
    """One size of every sweep before the next, so that a run cut short has met all."""
    rows = [[Case(s, label, dtype) for label in s.sizes if label != TINY for dtype in s.dtypes] for s in found]
    return [row[i] for i in range(max(map(len, rows), default=0)) for row in rows if i < len(row)]


# ---- compiles ----


@dataclass(frozen=True)
class Compiled:
    """A candidate's launches in one case: the most registers, shared memory and spilled bytes among them, or what
    failed."""

    registers: int = 0
    shared: int = 0
    spilled: int = 0
    error: str = ""

    @property
    def good(self) -> bool:
        return not (self.spilled or self.error)


def compile_candidate(work: tuple[str, str, str, int, int]) -> Compiled:
    """(sweep, size, dtype, number of the candidate, compute capability), in words so that another process may do it."""
    from benchmarks._launches import launches

    name, label, dtype, index, arch = work
    (sweep,) = sweeps([name])
    case = Case(sweep, label, getattr(torch, dtype))
    warnings.simplefilter("ignore")
    try:
        with sweep.tunable.trying(case.candidates[index]):
            found = launches(lambda device: case.make(device).work, arch)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Compiled(*(max((getattr(f, k) for f in found), default=0) for k in ("registers", "shared", "spilled")))


def compile_all(found: Sequence[Case], arch: int) -> dict[str, list[Compiled]]:
    """Of each case, by name, its candidates; in as many processes as there are cores. What is compiled stays in
    Triton's cache, where the timed run finds it."""
    work = [(c.sweep.name, c.label, named(c.dtype), i, arch) for c in found for i in range(len(c.candidates))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        results = iter(list(tqdm(pool.map(compile_candidate, work, chunksize=4), "compile", len(work), disable=None)))
    return {c.name: [next(results) for _ in c.candidates] for c in found}


# ---- results ----


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in tensors(part)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an op allocates and does not write holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def results(work: Work) -> list[Tensor]:
    with poisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [t.clone() for t in tensors(work())]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, by norms in float64 taken piece by piece; infinite where one is NaN
    alone."""
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if f.shape != e.shape or f.dtype != e.dtype:
            return math.inf
        gap = size = 0.0
        for a, b in zip(f.reshape(-1).split(1 << 26), e.reshape(-1).split(1 << 26)):
            gap += float((a.double() - b.double()).square().sum())
            size += float(b.double().square().sum())
        here = math.sqrt(gap / size) if size else math.sqrt(gap)
        worst = max(worst, here if here == here else math.inf)
    return worst


def bound(case: Case) -> float:
    return case.sweep.tolerance.get(case.dtype, TOLERANCE[case.dtype])


def check(case: Case, candidate: dict[str, int], device: str) -> float:
    """The error of a candidate's results against the present choice's, on the same inputs."""
    torch.manual_seed(0)
    job = case.make(device)
    expected = results(job.work)
    with case.sweep.tunable.trying(candidate):
        return error(results(job.work), expected)


# ---- times ----


def milliseconds(works: Sequence[Work]) -> float:
    """Of one call: the median of ten replays of a graph that calls all in turn."""
    from triton.testing import do_bench_cudagraph

    time_all: float = do_bench_cudagraph(lambda: [w() for w in works], rep=5, return_mode="median")
    return time_all / len(works)


def copying(nbytes: int) -> float:
    """Bytes per second, read and written, of a copy that moves ``nbytes`` in all."""
    sources = [torch.randn(max(1, nbytes // 8), device="cuda") for _ in range(3)]
    target = torch.empty_like(sources[0])
    works = [lambda s=s: target.copy_(s) for s in sources]
    return 8 * sources[0].numel() / milliseconds(works) * 1e3


def run(case: Case, compiled: Sequence[Compiled], copy: float, device: str = "cuda") -> dict[str, Any]:
    """Times the candidates of a case; those that spill or differ are marked and not timed."""
    torch.manual_seed(0)
    jobs = [case.make(device)]
    jobs += [case.make(device) for _ in range(max(1, min(7, ROTATED // max(1, jobs[0].bytes))))]
    first = jobs[0]
    expected = results(first.work)
    rows: list[dict[str, Any]] = []
    for candidate, made in zip(case.candidates, compiled):
        row: dict[str, Any] = {
            "values": candidate,
            "registers": made.registers,
            "shared": made.shared,
            "wrong": made.error,
        }
        rows.append(row)
        if made.spilled:
            row["wrong"] = f"spills {made.spilled} bytes"
        if row["wrong"]:
            continue
        with case.sweep.tunable.trying(candidate):
            try:
                row["error"] = error(results(first.work), expected)
                if not row["error"] <= bound(case):
                    row["wrong"] = f"differs from the present choice by {row['error']:.1e}"
                    continue
                row["ms"] = milliseconds([j.work for j in jobs])
            except (torch.cuda.OutOfMemoryError, OutOfResources) as lacking:
                row["wrong"] = f"out of memory: {str(lacking).splitlines()[0]}"
                continue
        row["share_of_copy"] = first.bytes / (row["ms"] / 1e3) / copy if first.bytes else None
        row["tflops"] = first.flops / row["ms"] / 1e9 if first.flops else None
    return {
        "case": case.name,
        "choice": f"{case.sweep.name}, {named(case.dtype)}",
        "bytes": first.bytes,
        "flops": first.flops,
        "copy_bandwidth": copy,
        "candidates": rows,
    }


def said(values: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in values.items())


def table(found: Sequence[dict[str, Any]]) -> str:
    """One row a case: the present choice beside the best."""
    rows = []
    for case in found:
        timed = [c for c in case["candidates"] if "ms" in c]
        if not timed:
            rows.append([case["case"], "", "", "", "", "", "", case["candidates"][0]["wrong"]])
            continue
        now, best = case["candidates"][0], min(timed, key=lambda c: c["ms"])
        share, rate = best["share_of_copy"], best["tflops"]
        rows.append(
            [
                case["case"],
                said(now["values"]),
                f"{now['ms']:.4f}" if "ms" in now else now["wrong"],
                said(best["values"]),
                f"{best['ms']:.4f}",
                f"{now['ms'] / best['ms']:.2f}x" if "ms" in now else "",
                "" if share is None else f"{share:.0%}",
                "" if rate is None else f"{rate:.1f}",
            ]
        )
    return tabulate(
        rows, headers=["case", "now", "ms", "best", "ms", "gain", "of copy", "TFLOP/s"], disable_numparse=True
    )


def advice(found: Sequence[dict[str, Any]]) -> str:
    """Of each choice and dtype the candidate with the least product of times over its cases, of those good in all."""
    rows = []
    for name in dict.fromkeys(case["choice"] for case in found):
        mine = [case for case in found if case["choice"] == name]
        good = [i for i in range(len(mine[0]["candidates"])) if all("ms" in case["candidates"][i] for case in mine)]
        if not good:
            continue

        def mean(i: int, mine: list[dict[str, Any]] = mine) -> float:
            return math.exp(sum(math.log(case["candidates"][i]["ms"]) for case in mine) / len(mine))

        best = min(good, key=mean)
        gain = mean(0) / mean(best) if 0 in good else math.inf
        values = mine[0]["candidates"][best]["values"]
        rows.append([name, len(mine), said(mine[0]["candidates"][0]["values"]), said(values), f"{gain:.3f}x"])
    return tabulate(rows, headers=["choice", "cases", "now", "best over its cases", "gain"], disable_numparse=True)


def listing(found: Sequence[Sweep]) -> str:
    rows = [
        [
            s.name,
            *(said(s.tunable.of(size)) for size in (4, 2)),
            len(s.tunable.candidates),
            "; ".join(label for label in s.sizes if label != TINY),
            ", ".join(named(d) for d in s.dtypes),
        ]
        for s in found
    ]
    return tabulate(rows, headers=["choice", "now", "now, 16 bits", "candidates", "sizes", "dtypes"])


def dry_run(found: Sequence[Sweep], arch: int) -> int:
    """Compiles every candidate at each sweep's first size; 1 where the present choice spills or a compile fails."""
    first = [c for c in cases(found) if c.label == next(label for label in c.sweep.sizes if label != TINY)]
    compiled = compile_all(first, arch)
    rows, failed = [], 0
    for case in first:
        of = compiled[case.name]
        failed += not of[0].good or any(c.error for c in of)
        bad = [f"{said(v)}: {c.error or f'spills {c.spilled}'}" for v, c in zip(case.candidates, of) if not c.good]
        rows.append(
            [case.name, len(of), of[0].registers, max(c.registers for c in of), max(c.shared for c in of), len(bad)]
        )
        rows += [[f"  {b}"] for b in bad]
    headers = ["case", "candidates", "registers now", "most", "shared, most", "left out"]
    print(tabulate(rows, headers=headers))
    print(f"{sum(map(len, compiled.values()))} compiled for sm_{arch}; {failed} cases failed")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--op", nargs="+", default=[], metavar="NAME", help="a kernel file, or file.choice; default: all"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after so many, compiles included")
    parser.add_argument("--out", type=Path, default=Path("tune.json"), help="the JSON file, written after each case")
    parser.add_argument("--list", action="store_true", help="print the sweeps and end")
    parser.add_argument(
        "--dry-run", action="store_true", help="compile every candidate, report spills, and end; no GPU"
    )
    parser.add_argument("--arch", type=int, default=90, help="with --dry-run: compute capability, e.g. 80, 90 or 100")
    a = parser.parse_args()
    if not a.minutes > 0:
        parser.error(f"--minutes: {a.minutes}, expected a positive number")
    try:
        chosen = sweeps(a.op)
    except ValueError as wrong:
        parser.error(str(wrong))
    if a.list:
        print(listing(chosen))
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    if a.dry_run:
        return dry_run(chosen, a.arch)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is there; --list and --dry-run need none")
    from benchmarks.__main__ import environment, write

    start = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    every = cases(chosen)
    compiled = compile_all(every, 10 * major + minor)
    found: list[dict[str, Any]] = []
    copies: dict[int, float] = {}
    here = environment("cuda")
    for case in (bar := tqdm(every, "tune", disable=None)):
        if time.perf_counter() - start > 60 * a.minutes:
            print(f"--minutes {a.minutes:g} are over: {len(every) - len(found)} of {len(every)} cases were not begun")
            break
        bar.set_postfix_str(case.name)
        size = 1 << 30 if "1 GB" in case.label else 1 << 28
        if size not in copies:
            copies[size] = copying(size)
        found.append(run(case, compiled[case.name], copies[size]))
        write(a.out, {"environment": here, "seconds": time.perf_counter() - start, "cases": found})
    if found:
        print(
            f"{table(found)}\n\n{advice(found)}\n\n{a.out}: {len(found)} cases; edit TUNABLE in kernels/ where a gain "
            "holds"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
