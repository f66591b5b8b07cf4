"""The Triton kernels of NADE in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
import genfast.kernels.nade as kernel
from genfast import reference
from genfast._registry import OPS
from tests.conftest import poisoned
from tests.triton.flow_cases import FORWARD, GRADIENT, compare, each_dtype


def arguments(n, d, h, p, dtype=torch.float32, rescaled=False, own=False):
    w, v = 0.5 * torch.randn(d, h), torch.randn(d, p, h) / h**0.5
    c = torch.randn(n, h) if own else torch.randn(h)
    rho = torch.rand(d) + 0.5 if rescaled else None
    return [t if t is None else t.to(dtype) for t in (torch.randn(n, d), w, v, torch.randn(d, p), c, rho)]


def check(args, activation, need_x=True):
    x, w, v, _, c, rho = args
    compare(OPS["nade"], (*args, activation), FORWARD[x.dtype])
    grad = torch.randn(*x.shape, v.shape[1]).to(x.dtype)
    compare(OPS["nade_backward"], (grad, x, w, v, c, rho, activation, need_x), GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_types(dtype, activation):
    check(arguments(3, 5, 20, 2, dtype, True), activation)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (18, 4, 33, 1), (2, 35, 5, 3), (40, 3, 70, 1)], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_sizes(sizes, own):
    check(arguments(*sizes, own=own), "sigmoid", need_x=own)


def test_more_tiles_than_groups(monkeypatch):
    monkeypatch.setattr(kernel, "GROUPS", 2)
    check(arguments(90, 3, 4, 1), "tanh")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("kind", "p"), [("bernoulli", 1), ("categorical", 5), ("gaussian_mixture", 9)])
def test_samples(kind, p, known):
    n, d, h = 5, 6, 20
    _, w, v, b, c, rho = arguments(n, d, h, p, rescaled=True)
    uniforms = torch.rand(n, d, 2 if kind == "gaussian_mixture" else 1)
    given = (torch.rand(n, d), torch.rand(n, d) < 0.5) if known else (None, None)
    with poisoned(), genfast.backend("triton"):
        found = genfast.ops.nade_sample(uniforms, w, v, b, c, rescale=rho, kind=kind, given=given[0], known=given[1])
    expected = reference.nade_sample(uniforms, w, v, b, c, rho, *given, "sigmoid", kind)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "p"), [("bernoulli", 1), ("categorical", 5), ("gaussian_mixture", 9)])
def test_samples_of_parameters_that_are_not_finite_are_not_numbers(kind, p):
    _, w, v, b, c, _ = arguments(3, 4, 20, p)
    b[2, p // 9] = math.nan  # a logit, of a mixture of the second component
    uniforms = torch.rand(3, 4, 2 if kind == "gaussian_mixture" else 1)
    with poisoned(), genfast.backend("triton"):
        found = genfast.ops.nade_sample(uniforms, w, v, b, c, kind=kind)
    assert found.isnan().equal(torch.tensor([False, False, True, True]).expand(3, -1))
    assert reference.nade_sample(uniforms, w, v, b, c, None, None, None, "sigmoid", kind).isnan().equal(found.isnan())


def test_quantiles_of_the_normal_distribution():
    u = torch.cat([torch.logspace(-7, -0.4, 40), 1 - torch.logspace(-6, -0.4, 40)])
    uniforms = torch.stack((torch.full_like(u, 0.5), u), 1)[:, None]
    zero = torch.zeros(1, 3, 2)
    with genfast.backend("triton"):
        found = genfast.ops.nade_sample(
            uniforms, zero[:, 0], zero, torch.zeros(1, 3), zero[0, 0], kind="gaussian_mixture"
        )[:, 0]
    torch.testing.assert_close(
        found.double(), torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)), rtol=2e-5, atol=2e-6
    )


def test_wide_layers_run_the_reference():
    args = arguments(2, 2, kernel.UNITS + 1, 1)
    compare(OPS["nade"], (*args, "sigmoid"), 1e-5)
