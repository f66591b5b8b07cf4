"""The Triton kernels of upfirdn2d in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast._registry import OPS
from tests.conftest import poisoned

CASES = {
    "padding beyond the filter": ((1, 2, 3, 4), (3, 2), (2, 1), (1, 1), (7, 5, 6, 9)),
    "cropped on all sides": ((2, 1, 12, 11), (2, 3), (1, 1), (2, 2), (-3, -2, -1, -4)),
    "cropped after upsampling": ((1, 3, 5, 6), (4,), (3, 2), (1, 2), (-4, 1, 2, -3)),
    "one position": ((3, 2, 1, 1), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
    "rows longer than a tile": ((1, 2, 2, 700), (1, 4), (1, 1), (2, 1), (2, 1, 0, 0)),
    "more channels than a tile": ((1, 300, 2, 3), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1)),
    "12 separable taps, two passes": ((1, 2, 9, 13), (12,), (2, 2), (1, 1), (6, 5, 6, 5)),
    "12 separable taps down, two passes": ((1, 2, 14, 13), (12,), (1, 1), (2, 2), (5, 5, 5, 5)),
}


@pytest.mark.parametrize("flip", [False, True], ids=["convolution", "correlation"])
@pytest.mark.parametrize("form", ["dense", "channels_last", "strided"])
@pytest.mark.parametrize("label", CASES)
def test_upfirdn2d_shapes(label, form, flip):
    xs, fs, up, down, padding = CASES[label]
    x, f = torch.randn(xs), torch.randn(fs)
    if form == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if form == "strided":
        x = torch.randn([2 * s for s in xs])[tuple(slice(None, None, 2) for _ in xs)]
    args = (f, up, down, padding, flip, 1.7)
    with poisoned(), genfast.backend("triton"):
        y = OPS["upfirdn2d"](x, *args)
    exact = genfast.reference.upfirdn2d(x.double(), f.double(), *args[1:])
    assert y.shape == exact.shape
    assert float((y - exact).norm()) <= 2e-6 * float(exact.norm())


def test_what_lies_outside_the_filter_does_not_spread():
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 2, 3] = float("nan")
    with genfast.backend("triton"):
        y = genfast.ops.filter2d(x, torch.ones(3, 3))
    assert y.isnan()[0, 0].nonzero().amin(0).tolist() == [1, 2]
    assert int(y.isnan().sum()) == 9


def test_upfirdn2d_empty():
    with genfast.backend("triton"):
        assert genfast.ops.upsample2d(torch.randn(0, 3, 4, 4), torch.ones(4)).shape == (0, 3, 8, 8)
