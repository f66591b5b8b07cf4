"""The Triton kernels of affine_coupling in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
from genfast._registry import OPS
from genfast.kernels._common import View
from tests.conftest import poisoned
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import COUPLINGS, FORMS, two_dtypes

CPU = torch.device("cpu")


@two_dtypes
@pytest.mark.parametrize("label", COUPLINGS)
def test_affine_coupling_shapes(label, dtype):
    cases.check_coupling(cases.coupling(label, dict(device=CPU, dtype=dtype)), dtype)


PAIRS = sorted({(form, other) for form in FORMS for other in (form, "dense")} | {("dense", form) for form in FORMS})


@pytest.mark.parametrize(("form", "params_form"), PAIRS)
def test_affine_coupling_strides(form, params_form):
    for label in ("a channel each its alpha", "primes"):
        x, params, *rest = cases.coupling(label, dict(device=CPU, dtype=torch.float32))
        cases.check_coupling((cases.strided(x, form), cases.strided(params, params_form), *rest), torch.float32)


@pytest.mark.parametrize("form", ["dense", "channels_last", "channel slice"])
def test_affine_coupling_mask_strides(form):
    x, params, alpha, mask, *rest = cases.coupling("mask over everything", dict(device=CPU, dtype=torch.float32))
    mask = mask.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    cases.check_coupling((cases.strided(x, form), params, alpha, mask, *rest), torch.float32)


def test_affine_coupling_expanded_gradient():
    x, params, *rest = cases.coupling("primes", dict(device=CPU, dtype=torch.float32))
    grad = torch.ones(()).expand(x.shape)  # what y.sum() sends back
    cases.both_ways("affine_coupling", (x, params, *rest), [grad, None], torch.float32)


@pytest.mark.parametrize("label", ["a channel each its alpha", "odd halves", "vectors, alpha and mask"])
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_affine_coupling_mixed_dtypes(label, dtype, other):
    x, params, *rest = cases.coupling(label, dict(device=CPU, dtype=dtype), alpha_dtype=other)
    cases.check_coupling((x, params.to(other), *rest), torch.bfloat16 if dtype is torch.bfloat16 else torch.float16)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("saved", ["input", "output"])
def test_affine_coupling_masked_parameters_never_leak(inverse, saved):
    x, params = torch.randn(2, 3, 4, 6), torch.randn(2, 6, 4, 6)
    board = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    expected = genfast.ops.affine_coupling(x, params, scale="exp", mask=board[None], inverse=inverse)
    params[:, :, board] = math.nan
    x.requires_grad_()
    params.requires_grad_()
    with poisoned(), genfast.backend("triton"):
        y, logdet = genfast.ops.affine_coupling(
            x, params, scale="exp", mask=board[None], inverse=inverse, save_for_backward=saved
        )
        (y.square().sum() + logdet.sum()).backward()
    torch.testing.assert_close((y, logdet), expected)
    assert torch.equal(y[:, :, board], x[:, :, board])
    assert bool(x.grad.isfinite().all())
    assert torch.equal(params.grad[:, :, board], torch.zeros(2, 6, 12))
    assert bool((params.grad[:, :, ~board] != 0).all())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh", "softclamp"])
def test_affine_coupling_extremes_element_by_element(scale, inverse):
    """Every element by itself, not the norm over all: the tails of each scale map are as exact as its middle."""
    bound = {"exp": 80.0, "sigmoid": 80.0, "tanh": 40.0, "softclamp": 1e30}[scale]
    r = torch.cat([s * torch.logspace(-12, math.log10(bound), 300) for s in (1.0, -1.0)])
    x, t = torch.ones(600, 1), torch.zeros(600, 1)
    args = (x, torch.stack((r, t[:, 0]), 1), None, None, scale, "scale_shift", False, inverse, False)
    y, logdet = cases.run(OPS["affine_coupling"], args)
    exact_y, exact_logdet = OPS["affine_coupling"].reference(*cases.exact(args))
    assert float(((y - exact_y) / exact_y).abs().max()) < 2e-6
    # log sigmoid(r + 2) meets r + 2 rounded to float32, an absolute error where r cancels the 2.
    assert float(((logdet - exact_logdet) / exact_logdet).abs().max()) < 2e-6
    grads = (torch.zeros(600, 1), torch.ones(600))
    dparams = cases.run(OPS["affine_coupling_backward"], (*grads, *args))[1][:, 0]
    exact_dr = OPS["affine_coupling_backward"].reference(*cases.exact((*grads, *args)))[1][:, 0]
    tiny = exact_dr.abs() < 1e-30  # float32's own end, which the tail of sech^2 passes
    if scale == "tanh":  # the reference forms 1 - tanh^2, which cancels in float64 as well
        exact_dr = (-1 if inverse else 1) / torch.cosh(r.double()) ** 2
    assert float(((dparams - exact_dr) / exact_dr)[~tiny].abs().max()) < 4e-6


def test_affine_coupling_infinite_and_nan_parameters_stay_in_their_sample():
    params = torch.zeros(4, 4, 2, 2)
    params[1, 0], params[2, 1, 0, 0], params[3, 0, 0, 0] = math.inf, math.nan, 100.0
    with genfast.backend("triton"):
        y, logdet = genfast.ops.affine_coupling(torch.ones(4, 4, 2, 2), params)
    assert bool(y[0].isfinite().all())
    assert logdet[0] == 0
    assert logdet[1] == math.inf
    assert logdet[2].isnan()
    assert logdet[3] == 100.0
    assert bool(y[1, 0].isinf().all())
    assert y[3, 0, 0, 0] == math.inf
    assert bool(y[:, 2:].eq(1).all())


def test_affine_coupling_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(View, "far", property(lambda self: True))
    args = cases.coupling("alpha, long rows", dict(device=CPU, dtype=torch.float32))
    cases.check_coupling(args, torch.float32)
