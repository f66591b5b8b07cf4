"""A pytest plugin for a peer's own suite: seeds each test, accelerates every model if asked to, and writes down what
happened.

It reads three environment variables: GENFAST_PEER (the peer's name), GENFAST_ACCELERATE ("1" or "0") and GENFAST_RESULT
    (the
JSON file to write).
"""

from __future__ import annotations

import collections
import functools
import importlib
import inspect
import json
import os
import pkgutil
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

# This checkout's genfast, with its folder out of the path again: a peer's tests have a package "tests" too.
sys.path.insert(0, str(Path(__file__).parents[2]))
import genfast  # noqa: E402

sys.path.pop(0)

PEER = os.environ["GENFAST_PEER"]
ACCELERATED = os.environ["GENFAST_ACCELERATE"] == "1"
RESULT = os.environ["GENFAST_RESULT"]

failed: dict[str, str] = {}
passed: set[str] = set()
swapped: collections.Counter[str] = collections.Counter()
left: collections.Counter[str] = collections.Counter()
seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
depth = 0


def _after(init: Any) -> Any:
    """``init``, and when the outermost one of a tree of modules has returned, ``accelerate``."""

    @functools.wraps(init)
    def wrapped(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        global depth
        depth += 1
        try:
            init(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            _accelerate(self)

    return wrapped


def _accelerate(model: torch.nn.Module) -> None:
    report = genfast.report(genfast.accelerate(model))
    new = [m for m in model.modules() if isinstance(m, genfast.integrations.Swapped) and m not in seen]
    seen.update(new)
    swapped.update(type(m).__name__ for m in new)
    left.update(f"{e.name}: {e.detail}" for e in report.left)


def _classes() -> set[type[torch.nn.Module]]:
    package = importlib.import_module(PEER)
    found = set()
    for info in pkgutil.walk_packages(package.__path__, f"{PEER}."):
        if info.name.endswith(("_test", ".conftest")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # a part that needs a package which is not there
            continue
        found |= {c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, torch.nn.Module)}
    return {c for c in found if c.__module__.split(".")[0] == PEER and "__init__" in vars(c)}


def pytest_configure(config: Any) -> None:
    if ACCELERATED:
        for cls in _classes():
            cls.__init__ = _after(cls.__init__)  # type: ignore[misc]


def pytest_runtest_setup(item: Any) -> None:
    # With 0, zuko's test of multivariate transforms meets a matrix that it cannot invert to its tolerance.
    torch.manual_seed(1)
    np.random.seed(0)  # noqa: NPY002  the suites draw from the global generator
    random.seed(0)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        lines = str(report.longrepr).strip().splitlines()
        failed[report.nodeid] = next(
            (line for line in reversed(lines) if line.startswith("E ")), lines[-1] if lines else ""
        )
    elif report.when == "call" and report.passed:
        passed.add(report.nodeid)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        failed[report.nodeid] = str(report.longrepr).strip().splitlines()[-1]


def pytest_sessionfinish(session: Any) -> None:
    result = {"failed": failed, "passed": sorted(passed - set(failed)), "swapped": dict(swapped), "left": dict(left)}
    with open(RESULT, "w") as file:
        json.dump(result, file, indent=1)
