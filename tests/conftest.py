"""Shared by all tests: a fixed seed, memory full of NaN, and the samples that every declared op is tested on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from genfast._registry import OPS, Op, Sample


def pytest_configure() -> None:
    """One thread a worker, since pytest-xdist starts a worker a core; tests of threads set their own number."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills the memory that torch.empty returns with NaN, so that an element that no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def sampled() -> Iterator[tuple[Op, Sample]]:
    """Every sample of every op that declares some: a new op is tested without being listed."""
    for op in OPS.values():
        if op.samples is not None:
            for sample in op.samples(torch.Generator().manual_seed(0)):
                yield op, sample


SAMPLES = list(sampled())
SAMPLE_IDS = [f"{op.name}-{sample.label}" for op, sample in SAMPLES]
each_sample = pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=SAMPLE_IDS)
_FIRST = {id(next(sample for other, sample in SAMPLES if other is op)) for op in OPS.values() if op.samples is not None}
# For tests that compile: ``make test`` takes the first sample of each op, ``make slow`` every fourth of the others, or
# all of them where GENFAST_EVERY_SAMPLE=1.
_STEP = 1 if os.environ.get("GENFAST_EVERY_SAMPLE") == "1" else 4
_COMPILED = [i for i, (_, sample) in enumerate(SAMPLES) if id(sample) in _FIRST or i % _STEP == 0]
each_sample_compiled = pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(*SAMPLES[i], marks=() if id(SAMPLES[i][1]) in _FIRST else pytest.mark.slow) for i in _COMPILED],
    ids=[SAMPLE_IDS[i] for i in _COMPILED],
)
