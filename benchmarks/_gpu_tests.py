"""A pytest plugin for gpu_check: each test's end in a file at once, and a stop where the GPU is spoilt for those to
come.

The file, GENFAST_TEST_RECORD, outlives the process; tests that it names are left out, so that another process takes
over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import outcomes, read_lines

RECORD = Path(os.environ["GENFAST_TEST_RECORD"])


def spoilt() -> bool:
    from genfast import _verify

    return _verify.spoilt("cuda")


def _say(**what: Any) -> None:
    with RECORD.open("a") as file:
        file.write(json.dumps(what) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    i, n = map(int, os.environ["GENFAST_TEST_PART"].split("/"))
    ran, _ = outcomes(read_lines(RECORD))
    _say(collected=[item.nodeid for item in items[i::n]])
    kept = [item for item in items[i::n] if item.nodeid not in ran]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _say(start=item.nodeid)
    item.stash[_REPORTS] = []
    result = yield
    reports = item.stash[_REPORTS]
    failed = next((r for r in reports if r.failed), None)
    skipped = any(r.skipped for r in reports)
    message = (
        "" if failed is None else str(getattr(getattr(failed.longrepr, "reprcrash", None), "message", failed.longrepr))
    )
    _say(
        end=item.nodeid,
        outcome="failed" if failed else "skipped" if skipped else "passed",
        message=message[:400],
        seconds=round(sum(r.duration for r in reports), 3),
    )
    if failed and spoilt():
        item.session.shouldstop = "the GPU is spoilt; another process takes the rest"
    return result


_REPORTS: pytest.StashKey[list[pytest.TestReport]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[_REPORTS].append(report)
    return report
