"""What this installation can do, for people and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from . import _backend
from ._registry import OPS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """Versions, the processor and GPU in use, and per op which backend serves which device and why another cannot.

    Returns:
        A dictionary with the keys "versions", "cpu", "gpu", "backends" and "ops".

    Example:
        >>> import genfast
        >>> sorted(genfast.info())
        ['backends', 'cpu', 'gpu', 'ops', 'versions']
    """
    cpu, reason = _backend.extension("_cpu")
    gpu: dict[str, Any] = {"available": torch.cuda.is_available()}
    if gpu["available"]:
        major, minor = torch.cuda.get_device_capability()
        gpu |= {"name": torch.cuda.get_device_name(), "arch": f"sm_{major}{minor}", "cuda": torch.version.cuda}
    else:
        gpu["reason"] = "no CUDA GPU is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
    devices = ["cpu", *(["cuda"] if gpu["available"] else [])]
    ops: dict[str, Any] = {}
    for name, op in OPS.items():
        refusals = {
            device: {b: op.refusal(b, device) for b in _backend.BACKENDS if b != "reference"} for device in devices
        }
        ops[name] = {
            device: {
                "serves": [b for b in _backend.PREFERENCE[device] if b == "reference" or not refusals[device][b]],
                "cannot": {b: why for b, why in refusals[device].items() if why},
            }
            for device in devices
        }
    return {
        "versions": {
            "genfast": _version("genfast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "platform": platform.platform(),
        },
        "cpu": {
            "processor": _processor(),
            "kernels": cpu.isa() if cpu is not None else f"none: {reason}",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "gpu": gpu,
        "backends": {
            "forced": _backend.forced,
            **{b: {d: _backend.unusable(b, d) or "usable" for d in devices} for b in _backend.BACKENDS},
        },
        "ops": ops,
    }


def print_info() -> None:
    """:func:`info` as a page of text on standard output."""
    found = info()
    for section in ("versions", "cpu", "gpu"):
        print(section)
        for key, value in found[section].items():
            print(f"  {key:<10} {value}")
    print("backends")
    for name in _backend.BACKENDS:
        states = "; ".join(f"{device}: {state}" for device, state in found["backends"][name].items())
        print(f"  {name:<10} {states}")
    if found["backends"]["forced"]:
        print(f"  forced     {found['backends']['forced']}")
    print("ops")
    for name, devices in found["ops"].items():
        for device, entry in devices.items():
            print(f"  {name:<26} {device}: {' > '.join(entry['serves'])}")
            for backend, why in entry["cannot"].items():
                print(f"  {'':<26}   not {backend}: {why}")
    sys.stdout.flush()
