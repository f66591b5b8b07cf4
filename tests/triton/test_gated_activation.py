"""The Triton kernels of gated_activation in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels._common import View
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, two_dtypes


@two_dtypes
@pytest.mark.parametrize("kind", ["none", "all", "sample", "spatial"])
@pytest.mark.parametrize(
    "shape",
    [(1, 6, 1, 1), (3, 30, 7, 11), (2, 132, 3, 3), (3, 6, 40, 31), (600, 6), (2, 6, 4, 5, 2), (2, 6, 0, 4)],
    ids=str,
)
def test_gated_activation_shapes(shape, kind, dtype):
    bias = {"none": None, "all": shape[1:2], "sample": shape[:2], "spatial": shape}[kind]
    bias = None if bias is None else torch.randn(bias).to(dtype)
    for groups in (1, 3):
        cases.check_gated(torch.randn(shape).to(dtype), bias, groups, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_gated_activation_strides(form):
    x = cases.strided(torch.randn(3, 12, 5, 7), form)
    for bias in (
        None,
        torch.randn(12, 2)[:, 0],
        torch.randn(12, 3).T,
        torch.randn(3, 12, 5, 7),
        cases.strided(x, form),
    ):
        cases.check_gated(x, bias, 3, torch.float32)


def test_gated_activation_more_tiles_than_rows(monkeypatch):
    import genfast.kernels.gated_activation as kernel

    monkeypatch.setitem(kernel.TUNABLE["backward"].now, "rows", 3)
    for bias in (torch.randn(8), torch.randn(7, 8)):
        cases.check_gated(torch.randn(7, 8, 40, 40), bias, 1, torch.float32)


def test_gated_activation_extremes():
    v = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.6, 5.0, 20.0, 80.0, 300.0, math.inf])
    v = torch.cat((v, -v))
    x = torch.cartesian_prod(v, v)
    y = cases.run(OPS["gated_activation"], (x, None, 1))[0]
    exact = x[:, :1].double().tanh() * x[:, 1:].double().sigmoid()
    ordinary = exact.abs() > 1e-37
    assert float(((y - exact) / exact)[ordinary].abs().max()) < 1e-6
    dx = cases.run(OPS["gated_activation_backward"], (torch.ones_like(y), x, None, 1))[0]
    assert bool(dx.isfinite().all())


def test_gated_activation_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(View, "far", property(lambda self: True))
    cases.check_gated(torch.randn(3, 6, 9, 8), torch.randn(3, 6), 3, torch.float32)
