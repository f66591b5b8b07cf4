"""One test per case, which pytest-benchmark runs too. The providers' interleaved times are handed on as a property."""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import importlib
import json
import math
import os
import pkgutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks
from benchmarks import _ceilings
from benchmarks._case import Case, measure


def cases() -> list[Case]:
    """Every case of every bench_*.py file; the file names its op."""
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name.startswith("bench_"))
    found = []
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        found += [dataclasses.replace(c, op=name.removeprefix("bench_")) for c in getattr(module, "CASES", [])]
    return found


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"GENFAST_BENCH_{name}", default)


QUICK = _setting("QUICK", "0") == "1"
COMPILE = _setting("COMPILE", "1") == "1"
UNTIL = float(_setting("UNTIL", "inf"))  # by the clock: no case begins later
CAP = float(_setting("CAP", "inf"))  # seconds of a case, after which its process is ended
LAST_WORDS = _setting("LAST_WORDS", os.devnull)  # the file where a process that ends so says why
_ceilings.DEVICE = _setting("DEVICE", "cpu")
SELECTED = [case for case in cases() if case.quick or not QUICK]
if (
    math.isfinite(UNTIL) or _ceilings.DEVICE == "cuda"
):  # what matters most comes first, and a case of each op before another
    seen: collections.Counter[tuple[int, str]] = collections.Counter()
    places = {}
    for case in SELECTED:
        places[case.name] = (case.priority, not case.quick, seen[case.priority, case.op])
        seen[case.priority, case.op] += 1
    SELECTED.sort(key=lambda case: places[case.name])


@pytest.fixture
def limited() -> Any:
    """Nothing begins when time is up; what hangs, also in a kernel, takes its process with it, and the next case
    another."""
    if time.time() > UNTIL:
        pytest.skip("time is up")
    with open(LAST_WORDS, "w") as last_words:
        if math.isfinite(CAP):
            faulthandler.dump_traceback_later(CAP, exit=True, file=last_words)
        yield
        faulthandler.cancel_dump_traceback_later()


def _guarded(work: Callable[[], Any]) -> str:
    """What ``work`` found, as JSON. After an error that lets no kernel of this process run again, the process ends."""
    try:
        return json.dumps(work())
    except Exception as error:
        if _ceilings.DEVICE == "cuda" and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                Path(LAST_WORDS).write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
                os._exit(1)
        raise


def test_ceilings(limited: None, record_property: Callable[[str, object], None]) -> None:
    record_property("result", _guarded(lambda: {"ceilings": _ceilings.measured()}))


@pytest.mark.parametrize("case", SELECTED, ids=[case.name for case in SELECTED])
def test_case(
    case: Case, limited: None, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    effort: dict[str, Any] = dict(rounds=15, budget=1.5) if QUICK else dict(rounds=60, budget=8)
    if _ceilings.DEVICE == "cuda":
        effort = dict(rounds=20, budget=1.0)
    found = _guarded(lambda: {"case": measure(case, compiled=COMPILE, cap=CAP / 2, **effort)})
    record_property("result", found)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # where pytest-benchmark is at home
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = case.name
        benchmark.pedantic(case.providers["genfast"](), rounds=5, iterations=1, warmup_rounds=1)


def test_overhead(limited: None, record_property: Callable[[str, object], None]) -> None:
    from benchmarks import bench_overhead

    record_property("result", _guarded(lambda: {"overhead": bench_overhead.measure()}))
