"""The Triton kernels of invertible_conv1x1 in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels._common import View
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, each_dtype, two_dtypes


@pytest.mark.parametrize("channels", [65, 100])
def test_channel_mix_several_blocks(channels):
    x, x_b = torch.randn(1, 40, 3, 2), torch.randn(1, channels - 40, 3, 2)
    cases.check_mix(x, x_b, 70 if channels > 70 else 30, torch.float32, True)


@two_dtypes
@pytest.mark.parametrize("channels", [1, 3, 12, 17, 33])
def test_channel_mix_channels(channels, dtype):
    x, split = torch.randn(2, channels, 5, 3).to(dtype), max(1, channels // 2)
    cases.check_mix(x, None, channels, dtype, False)
    cases.check_mix(x, None, split, torch.float32, True)
    if channels > 1:
        cases.check_mix(x[:, :split], x[:, split:], channels - split, dtype, True)


@two_dtypes
@pytest.mark.parametrize("form", FORMS)
def test_channel_mix_strides(form, dtype):
    x, x_b = (cases.strided(torch.randn(3, c, 5, 7).to(dtype), form) for c in (6, 5))
    cases.check_mix(x, x_b, 4, torch.float32, True)
    cases.check_mix(x, None, 6, dtype, False)


@pytest.mark.parametrize("shape", [(300, 6), (1, 6), (2, 6, 13), (2, 6, 3, 2, 3), (0, 6, 2, 2), (0, 6)], ids=str)
def test_channel_mix_shapes(shape):
    cases.check_mix(torch.randn(shape), None, 4, torch.float32, True)


@pytest.mark.parametrize("form", ["dense", "channels_last", "vectors"])
@each_dtype
def test_channel_mix_library_arrangement(form, dtype, monkeypatch):
    import genfast.kernels.invertible_conv1x1 as kernel

    monkeypatch.setitem(kernel.LIBRARY_ABOVE, dtype, 8)
    monkeypatch.setattr(kernel, "_launch_mix", None)  # so that the kernel is not what answers
    shape = (9,) if form == "vectors" else (9, 4, 3)
    x, x_b = torch.randn(2, *shape).to(dtype), torch.randn(2, 3, *shape[1:]).to(dtype)
    if form == "channels_last":
        x, x_b = cases.strided(x, form), cases.strided(x_b, form)
    cases.check_mix(x, None, 9, dtype, False)
    cases.check_mix(x, x_b, 5, dtype, True)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_channel_mix_keeps_every_bit_of_a_float32_weight(dtype):
    fine = 2.0**-14
    weight = torch.tensor([[1.0 + fine, 1.0], [1.0, 1.0 - fine]])  # float16 holds neither 1 + 2^-14 nor 1 - 2^-14
    x = torch.tensor([[1.0, -1.0]], dtype=dtype)
    y, _ = cases.run(OPS["channel_mix"], (x, None, weight, None, 2))
    assert y.tolist() == [[fine, fine]]


def test_channel_mix_follows_the_tf32_switch():
    import genfast.kernels.invertible_conv1x1 as kernel

    x, before = torch.zeros(1), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert kernel.precision(x) == "tf32"
        assert kernel.precision(x.half()) == "ieee"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert kernel.precision(x) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_channel_mix_64_bit_offsets(monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    monkeypatch.setattr(View, "far", property(lambda self: True))
    cases.check_mix(torch.randn(3, 5, 9, 8), torch.randn(3, 4, 9, 8), 3, torch.float32, True)
