"""The Triton kernels of interpolate in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels.interpolate import Rows
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, each_dtype

SHAPES = [(1, 1), (3, 5, 7, 11), (70, 2), (2, 2100), (2, 3, 40, 31), (2, 4, 19), (2, 3, 2, 3, 4), (0, 3, 4), (3, 2, 0)]


def _check_interpolate(real, fake, grad, epsilon):
    dtype = real.dtype
    cases.compare(OPS["interpolate"], (real, fake, epsilon), FORWARD[dtype])
    for wanted in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        cases.compare(OPS["interpolate_backward"], (grad, real, fake, epsilon, wanted), GRADIENT[dtype])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolate_shapes(shape, dtype):
    _check_interpolate(*(torch.randn(shape).to(dtype) for _ in range(3)), torch.rand(shape[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", ["dense", "channels_last", "column slice"])
def test_interpolate_strides(form, other):
    real, fake, grad = (torch.randn(3, 4, 5, 7) for _ in range(3))
    _check_interpolate(cases.strided(real, form), cases.strided(fake, other), grad, torch.rand(6)[::2])
    _check_interpolate(real, cases.strided(fake, form), cases.strided(grad, other), torch.rand(3).bfloat16().float())


def test_interpolate_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(Rows, "far", property(lambda self: True))
    _check_interpolate(*(torch.randn(3, 2500) for _ in range(3)), torch.rand(3))
