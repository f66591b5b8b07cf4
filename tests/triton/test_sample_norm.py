"""The Triton kernels of sample_norm in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels.interpolate import Rows
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, GRADIENT, each_dtype

SHAPES = [(1, 1), (3, 5, 7, 11), (70, 2), (2, 2100), (2, 3, 40, 31), (2, 4, 19), (2, 3, 2, 3, 4), (0, 3, 4), (3, 2, 0)]


def _check_norm(x):
    for squared in (False, True):
        norm = cases.compare(OPS["sample_norm"], (x, squared), 2e-6)[0]
        assert norm.dtype == torch.float32
        back = (x, norm, torch.randn(norm.shape), squared)
        cases.compare(OPS["sample_norm_backward"], back, GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_norm_shapes(shape, dtype):
    _check_norm(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_sample_norm_strides(form):
    _check_norm(cases.strided(torch.randn(3, 4, 5, 7), form))


def test_sample_norm_more_tiles_than_programs(monkeypatch):
    import genfast.kernels.sample_norm as kernel

    monkeypatch.setitem(kernel.TUNABLE["forward"].now, "programs", 6)
    _check_norm(torch.randn(2, 9000))


def test_sample_norm_extremes():
    x = torch.tensor([1.0, 1e30, 1e-30, 3e38, 1e-42, 0.0])[:, None] * torch.tensor([[0.6, -0.8, 0.0]])
    norm = cases.compare(OPS["sample_norm"], (x, False), 1e-6)[0]
    assert (
        float((norm.double() - x.double().norm(dim=1)).abs().div(x.double().norm(dim=1).clamp_min(1e-300)).max()) < 1e-3
    )
    dx = cases.run(OPS["sample_norm_backward"], (x, norm, torch.ones(6), False))[0]
    torch.testing.assert_close(dx[:4], torch.tensor([0.6, -0.8, 0.0]).expand(4, 3))
    assert not dx[5].any()


def test_sample_norm_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(Rows, "far", property(lambda self: True))
    _check_norm(torch.randn(3, 2500))
