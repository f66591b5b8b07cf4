"""Shared by all tests: a fixed seed, and the names of what every declared op is tested for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genfast._registry import OPS, Op, Sample


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sampled() -> Iterator[tuple[Op, Sample]]:
    """Every sample of every op that declares some: a new op is tested without being listed."""
    for op in OPS.values():
        if op.samples is not None:
            for sample in op.samples(torch.Generator().manual_seed(0)):
                yield op, sample


SAMPLES = list(sampled())
SAMPLE_IDS = [f"{op.name}-{sample.label}" for op, sample in SAMPLES]
each_sample = pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=SAMPLE_IDS)
