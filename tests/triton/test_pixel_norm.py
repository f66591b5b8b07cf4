"""The Triton kernels of pixel_norm in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels import pixel_norm as pixel_norm_kernels
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, compare, each_dtype, strided


def check_pixel_norm(x, eps=1e-8, grad=None):
    compare(OPS["pixel_norm"], (x, eps), FORWARD[x.dtype])
    compare(OPS["pixel_norm_backward"], (torch.randn_like(x) if grad is None else grad, x, eps), GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 2), (7, 5), (3, 2100), (700, 3), (2, 130, 65), (2, 70, 3, 5), (2, 3, 3, 5, 2), (0, 3, 4)]
)
def test_pixel_norm_shapes(shape, dtype):
    check_pixel_norm(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_pixel_norm_strides(form):
    x = strided(torch.randn(2, 5, 6, 4), form)
    for grad in (torch.randn(2, 5, 6, 4), strided(torch.randn(2, 5, 6, 4), form), torch.ones(()).expand(2, 5, 6, 4)):
        check_pixel_norm(x, 0.1, grad)


def test_pixel_norm_more_channels_than_a_tile(monkeypatch):
    monkeypatch.setitem(pixel_norm_kernels.TUNABLE["norm"].now, "tile", 64)
    check_pixel_norm(torch.randn(2, 70, 9))
    check_pixel_norm(torch.randn(2, 70, 3, 5).contiguous(memory_format=torch.channels_last))
    check_pixel_norm(torch.randn(9, 70))


def test_pixel_norm_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(pixel_norm_kernels.View, "far", property(lambda self: True))
    check_pixel_norm(torch.randn(2, 70, 40))
