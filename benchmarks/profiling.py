"""``python -m benchmarks --profile OP``: a Chrome trace of a case, and its three largest costs by name."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import _ceilings
from benchmarks._case import Case
from genfast._peak_memory import quiet

CALLS = 10
LARGE = 16 * 2**20  # bytes of a trace above which it is packed, as the viewers take it too


def chosen(cases: list[Case], name: str) -> Case:
    """The case of that name; else the first of that op, one of the quick ones if there is one.

    An op is what the files are named after, or the first word of a case's name.

    Raises:
        ValueError: there is neither.
    """
    for case in cases:
        if case.name == name:
            return case
    of_op = [case for case in cases if name in (case.op, case.name.split()[0])]
    if not of_op:
        ops = sorted(
            {case.op for case in cases} | {case.name.split()[0] for case in cases if "_" in case.name.split()[0]}
        )
        raise ValueError(
            f"--profile {name!r}: expected an op, {', '.join(ops)}, or the name of a case, as --list shows them"
        )
    return min(of_op, key=lambda case: not case.quick)


def profiled(case: Case, provider: str = "genfast", calls: int = CALLS) -> Any:
    """``torch.profiler`` over ``calls`` warm calls of one provider."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if _ceilings.DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with _ceilings.products(case.dtype):
        torch.manual_seed(0)
        work = case.providers[provider]()
        for _ in range(3):  # compiles and tunes
            work()
        with quiet(), torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
            for _ in range(calls):
                work()
            if _ceilings.DEVICE == "cuda":
                torch.cuda.synchronize()
    return profile


def costs(profile: Any, device: str) -> list[tuple[str, float, float, int]]:
    """(name, seconds, share, calls), the largest first: of the kernels on a GPU, and of the ops by their own time on a
    CPU."""
    found: dict[str, tuple[float, int]] = {}
    for event in profile.key_averages():
        if device == "cuda":
            if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
                continue
            name, microseconds = event.key, event.self_device_time_total
        else:
            # torch.library runs an op's forward inside what it calls this, when a gradient is wanted.
            wrapped = re.fullmatch(r"GeneratedBackwardFor_genfast_(\w+)_default", event.key)
            name = event.key if wrapped is None else f"genfast::{wrapped[1]}"
            microseconds = event.self_cpu_time_total
        seconds, count = found.get(name, (0.0, 0))
        found[name] = seconds + microseconds / 1e6, max(count, event.count)
    total = sum(seconds for seconds, _ in found.values()) or 1.0
    ranked = sorted(found.items(), key=lambda cost: -cost[1][0])
    return [(name, seconds, seconds / total, count) for name, (seconds, count) in ranked]


def write(profile: Any, path: Path) -> Path:
    """The Chrome trace, whole or not at all, packed if it is large; returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        plain = Path(folder, "trace.json")
        profile.export_chrome_trace(str(plain))
        if plain.stat().st_size > LARGE:
            packed = Path(folder, "trace.json.gz")
            with plain.open("rb") as source, gzip.open(packed, "wb") as target:
                shutil.copyfileobj(source, target)
            plain, path = packed, path.with_name(f"{path.name}.gz")
        os.replace(plain, path)
    return path


def run(name: str, device: str, out: Path) -> int:
    """Profiles genfast's work in the case ``name`` means, writes the trace into ``out`` and prints the three largest
    costs.

    Raises:
        ValueError: no case or op has that name.
    """
    from benchmarks.__main__ import slug
    from benchmarks.test_cases import cases

    _ceilings.DEVICE = device
    case = chosen(cases(), name)
    profile = profiled(case)
    path = write(profile, out / f"profile-{slug(name)}-{device}.json")
    rows = [[n[:100], f"{1e3 * s / CALLS:.3f}", f"{share:.1%}", c] for n, s, share, c in costs(profile, device)[:3]]
    print(f"{case.name}: genfast, {CALLS} calls on {device}; dispatched, as always while a profiler watches")
    print(tabulate(rows, headers=["largest costs", "ms a call", "share", f"calls in {CALLS}"]))
    print(f"\n{path}: open it in chrome://tracing or ui.perfetto.dev")
    return 0
