"""The Triton kernels of actnorm in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
from genfast.kernels._common import View
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, two_dtypes


def test_actnorm_more_channels_than_a_tile():
    cases.check_actnorm(torch.randn(3, 1100), torch.float32, True, True)


@two_dtypes
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 5, 7, 11), (2, 130, 3, 3), (3, 3, 40, 31), (600, 3), (2, 3, 4, 5, 2)], ids=str
)
def test_actnorm_shapes(shape, log_scale, inverse, dtype):
    cases.check_actnorm(torch.randn(shape).to(dtype), dtype, log_scale, inverse)


@pytest.mark.parametrize("form", FORMS)
def test_actnorm_strides(form):
    for inverse in (False, True):
        x = cases.strided(torch.randn(3, 6, 5, 7), form)
        cases.check_actnorm(x, torch.float32, False, inverse)
        cases.check_actnorm(x.bfloat16(), torch.float32, True, inverse)


def test_actnorm_more_tiles_than_rows(monkeypatch):
    import genfast.kernels.actnorm as kernel

    monkeypatch.setitem(kernel.TUNABLE["backward"].now, "rows", 3)
    cases.check_actnorm(torch.randn(7, 4, 9, 9), torch.float32, False, True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (2, 3, 0, 4)], ids=str)
def test_actnorm_empty(shape):
    cases.check_actnorm(torch.randn(shape), torch.float32, True, False)


def test_actnorm_zero_scale_is_minus_infinity():
    with genfast.backend("triton"):
        y, logdet = genfast.ops.actnorm(torch.ones(2, 2, 3), torch.tensor([1.0, 0.0]), torch.ones(2))
    assert bool(logdet.eq(-math.inf).all())
    assert bool(y.isfinite().all())


def test_actnorm_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(View, "far", property(lambda self: True))
    cases.check_actnorm(torch.randn(3, 5, 9, 8), torch.float32, True, True)
