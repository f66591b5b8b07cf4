"""One pair of processes for all tests here, which pytest-xdist therefore keeps on one worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .ranks import Ranks

QUICK = ("test_ranks.py", "test_variational_training.py")  # in ``make test``; the others in ``make slow``


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in QUICK:
            item.add_marker(pytest.mark.slow)
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    found = Ranks(2)
    yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As on the ranks: the models are made in float32, by factorisations whose last digits depend on the number of
    threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
