"""The Triton kernels of the diagonal Gaussian in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast._registry import OPS
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, compare, each_dtype, strided


def check(given, per_dimension, wanted=(True,) * 5, kl=True, z=True):
    mean = given[0]
    compare(OPS["diagonal_gaussian"], (*given, per_dimension), FORWARD[mean.dtype])
    wide = torch.float32
    grad_kl = torch.randn(mean.shape[0], dtype=wide) if kl else None
    grad_dimension = torch.randn(mean.shape[1:], dtype=wide) if per_dimension else None
    grad_z = torch.randn_like(mean) if z and given[2] is not None else None
    compare(
        OPS["diagonal_gaussian_backward"], (*given, grad_kl, grad_dimension, grad_z, list(wanted)), GRADIENT[mean.dtype]
    )


def some(shape, count=5, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


@each_dtype
@pytest.mark.parametrize("per_dimension", [False, True])
def test_types(dtype, per_dimension):
    check(some((7, 33), dtype=dtype), per_dimension)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 2), (70, 3), (3, 2100), (2, 3, 130), (3, 4, 3, 5), (2, 3, 3, 5, 2), (0, 3)]
)
@pytest.mark.parametrize("per_dimension", [False, True])
def test_shapes(shape, per_dimension):
    m, v, e, *_ = some(shape)
    check([m, v, e, None, None], per_dimension, (True, True, False, False, False))


@pytest.mark.parametrize("form", FORMS)
def test_layouts(form):
    check([strided(t, form) for t in some((2, 3, 4, 5))], True)
    check([strided(t, form) if i < 2 else t for i, t in enumerate(some((2, 3, 4, 5)))], True)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("prior", [(False, True), (True, False)])
@pytest.mark.parametrize(("kl", "z"), [(True, False), (False, True)])
def test_what_is_not_given_has_no_part(noise, prior, kl, z):
    m, v, e, pm, pv = some((4, 9))
    given = [m, v, e if noise else None, pm if prior[0] else None, pv if prior[1] else None]
    if kl or noise:
        check(given, False, kl=kl, z=z)


def test_near_the_prior_and_far_from_it():
    log_variance = torch.tensor([[1e-6, -1e-6, 1e-3], [-0.34, 0.35, 80.0], [-200.0, 100.0, float("-inf")]])
    with genfast.backend("triton"):
        found = torch.stack([genfast.ops.diagonal_gaussian_kl(torch.zeros(3, 1), v[:, None]) for v in log_variance])
    v = log_variance.double()
    exact = torch.where(v.abs() < 0.1, 0.25 * v.square() * (1 + v / 3 + v.square() / 12), 0.5 * (v.exp() - 1 - v))
    exact[2, 1] = torch.inf  # beyond float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=0)
