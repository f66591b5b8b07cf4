"""The Triton kernels of discretized_logistic_mixture in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
from genfast._registry import OPS
from genfast.kernels._common import View
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, each_dtype


def _mixture(shape, channels, k, levels, dtype=torch.float32):
    n, *positions = shape
    params = torch.randn((n, (10 if channels == 3 else 3) * k, *positions)).to(dtype)
    x = torch.randint(levels, (n, channels, *positions))
    x.view(-1)[::5], x.view(-1)[1::5] = 0, levels - 1
    return params, x


@pytest.mark.parametrize(("channels", "levels", "k"), [(1, 2, 3), (3, 256, 10), (3, 65536, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (600,), (2, 7, 11), (3, 37), (2, 2, 3, 5), (2, 0, 3)], ids=str)
def test_discretized_shapes(shape, channels, levels, k):
    cases.check_mixture(*_mixture(shape, channels, k, levels), levels, torch.float32)


@each_dtype
def test_discretized_dtypes(dtype):
    cases.check_mixture(*_mixture((2, 3, 7), 3, 10, 256, dtype), 256, dtype)


def test_discretized_more_components_than_a_tile():
    cases.check_mixture(*_mixture((2, 3), 3, 300, 256), 256, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_discretized_strides(form):
    params, x = _mixture((3, 5, 7), 3, 4, 100)
    for levels in (x, cases.strided(x, form), x.to(torch.uint8), x.to(torch.int16)):
        cases.check_mixture(cases.strided(params, form), levels, 100, torch.float32)


def test_discretized_extremes_are_finite_and_exact():
    log_s = torch.tensor([-9.0, -7.0, -4.0, 0.0, 5.0, 40.0])
    mean = torch.tensor([-200.0, -1.0, -0.3, 0.0, 1.0, 60.0])
    params = torch.cartesian_prod(torch.zeros(1), mean, log_s)
    for level in (0, 1, 100, 255):
        x = torch.full((len(params), 1), level)
        args = (params, x, 256)
        nll = cases.run(OPS["discretized_logistic_mixture_nll"], args)[0]
        exact = OPS["discretized_logistic_mixture_nll"].reference(*cases.exact(args))
        torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=2e-6)
        back = (params, x, torch.ones(len(params)), 256)
        found = cases.run(OPS["discretized_logistic_mixture_nll_backward"], back)[0]
        exact = OPS["discretized_logistic_mixture_nll_backward"].reference(*cases.exact(back))
        torch.testing.assert_close(found.double(), exact, rtol=3e-5, atol=1e-5)


def test_discretized_component_of_probability_zero():
    params, x = _mixture((4,), 3, 3, 256)
    params[:, 1] = -math.inf
    cases.check_mixture(params, x, 256, torch.float32)


def _same_levels(params, uniforms, channels, temperature):
    op, args = OPS["discretized_logistic_mixture_sample"], (params, uniforms, channels, 256, temperature)
    assert torch.equal(cases.run(op, args)[0], genfast.reference.discretized_logistic_mixture_sample(*args))


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_discretized_samples_equal_the_reference(temperature, dtype):
    for channels, k, shape in ((3, 10, (2, 5, 7)), (1, 3, (40,)), (3, 1, (2, 3)), (1, 5, (0, 3))):
        params, _ = _mixture(shape, channels, k, 256, dtype)
        uniforms = torch.rand(shape[0], 1 + channels, *shape[1:])
        uniforms.view(-1)[:3] = torch.tensor([0.0, 1.0, 0.5])[: uniforms.numel()]
        for form in ("dense", "channels_last"):
            p = cases.strided(params, form) if params.dim() == 4 else params
            _same_levels(p, uniforms, channels, temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 4, 6, 8])
def test_discretized_samples_of_parameters_that_are_not_finite_are_no_levels(place, value):
    params, uniforms = torch.zeros(5, 20), torch.rand(5, 4)
    params[2, place : place + 2] = value  # of both components
    _same_levels(params, uniforms, 3, 1.0)
    op = OPS["discretized_logistic_mixture_sample"]
    bad = place != 6 or math.isnan(value)  # an infinite coefficient is one, through tanh
    assert (cases.run(op, (params, uniforms, 3, 256, 1.0))[0] < 0).any(1).tolist() == [False, False, bad, False, False]


def test_discretized_samples_round_ties_to_even():
    params = torch.zeros(4, 3)
    params[:, 1] = torch.tensor([0.0, 2 / 255, -2 / 255, 4 / 255])
    _same_levels(params, torch.full((4, 2), 0.5), 1, 1.0)


def test_discretized_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(View, "far", property(lambda self: True))
    cases.check_mixture(*_mixture((3, 5, 4), 3, 5, 256), 256, torch.float32)
