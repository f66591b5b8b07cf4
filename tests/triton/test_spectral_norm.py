"""The Triton kernels of spectral_norm in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, each_dtype

WEIGHTS = [
    ((1, 1), 0),
    ((6, 9), 0),
    ((6, 9), 1),
    ((70, 133), 0),
    ((5, 3, 4, 4), 0),
    ((6, 21, 3, 3), 1),
    ((3, 4, 5), 2),
    ((2, 1100), 0),
    ((300, 3), 0),
]


def _check_spectral(weight, dim):
    u, v = torch.randn(weight.shape[dim]), torch.randn(weight.numel() // weight.shape[dim])
    _, left, right, sigma = OPS["spectral_norm"].reference(weight.float(), u, None, 8, 1e-12, dim)
    for given in ((u, None, 1), (u, None, 3), (u, v, 1), (u, v, 2), (left, right, 0)):
        cases.compare(OPS["spectral_norm"], (weight, *given, 1e-12, dim), FORWARD[weight.dtype])
    grad = torch.randn(weight.shape).to(weight.dtype)
    for pair in (
        (grad, None),
        (None, torch.randn(())),
        (grad.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(())),
    ):
        cases.compare(OPS["spectral_norm_backward"], (*pair, weight, left, right, sigma, dim), GRADIENT[weight.dtype])


@each_dtype
@pytest.mark.parametrize(("shape", "dim"), WEIGHTS, ids=str)
def test_spectral_norm_shapes(shape, dim, dtype):
    _check_spectral(torch.randn(shape).to(dtype), dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_spectral_norm_strides(form, dim):
    _check_spectral(cases.strided(torch.randn(6, 4, 3, 5), form), dim)


def test_spectral_norm_of_zero_product_is_floored():
    w, u = torch.zeros(4, 6), torch.ones(4)
    _, left, right, sigma = cases.run(OPS["spectral_norm"], (w, u, None, 1, 1e-12, 0))
    assert not left.any()
    assert not right.any()
    assert float(sigma) == 0
