"""What pytest-benchmark runs: one test per case. The providers' interleaved times ride along as extra_info."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import Any

import pytest

import benchmarks
from benchmarks import _ceilings
from benchmarks._case import Case, measure


def cases() -> list[Case]:
    """Every case of every bench_*.py file."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name.startswith("bench_"))
    loaded = [importlib.import_module(f"benchmarks.{name}") for name in names]
    return [case for module in loaded for case in getattr(module, "CASES", [])]


QUICK = os.environ.get("GENFAST_BENCH_QUICK") == "1"
_ceilings.DEVICE = os.environ.get("GENFAST_BENCH_DEVICE", "cpu")
SELECTED = [case for case in cases() if case.quick or not QUICK]


@pytest.mark.parametrize("case", SELECTED, ids=[case.name for case in SELECTED])
def test_case(case: Case, benchmark: Any) -> None:
    benchmark.group = case.name
    benchmark.extra_info.update(measure(case, rounds=15 if QUICK else 60, budget=3 if QUICK else 8))
    work = case.providers["genfast"]()
    benchmark.pedantic(work, rounds=5, iterations=1, warmup_rounds=1)


def test_overhead(benchmark: Any) -> None:
    from benchmarks import bench_overhead

    benchmark.group = "overhead"
    benchmark.extra_info["overhead"] = bench_overhead.measure()
    benchmark(bench_overhead.pairs()["affine_coupling"][0])
