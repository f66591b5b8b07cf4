"""The Triton kernels of upfirdn2d and modulated_conv in the interpreter; ``make slow`` runs this."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.fail("run ``make slow``, which runs this file under TRITON_INTERPRET=1", pytrace=False)

import genfast
from genfast._registry import OPS
from genfast._verify import errors
from tests.kernels import flow_cases as cases
from tests.kernels.flow_cases import DTYPES, FORWARD, GRADIENT

FAMILY = ("upfirdn2d", "channel_scale", "tap_energy")
SAMPLES = [(OPS[name], s) for name in FAMILY for s in OPS[name].samples(torch.Generator().manual_seed(0))]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])


@each_dtype
@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=[f"{op.name}-{s.label}" for op, s in SAMPLES])
def test_samples_match_the_float64_reference(op, sample, dtype):
    with cases.poisoned():
        forward, backward = errors(op, sample, dtype, "cpu", "triton")
    assert forward <= FORWARD[dtype]
    assert backward <= GRADIENT[dtype]


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
    with cases.poisoned(), genfast.backend("triton"):
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


SCALES = {
    "images": ((2, 5, 3, 7), (2, 1, 3, 7)),
    "one noise": ((3, 4, 5, 6), (1, 1, 5, 6)),
    "no noise": ((2, 9, 11, 13), None),
    "more channels than a tile": ((1, 1100, 2, 2), (1, 1, 2, 2)),
    "more positions than a tile": ((1, 3, 40, 40), (1, 1, 40, 40)),
    "vectors": ((5, 7), (5, 1)),
    "sequences": ((2, 3, 300), (1, 1, 300)),
    "empty batch": ((0, 3, 4, 4), (1, 1, 4, 4)),
    "no positions": ((2, 3, 0, 4), (2, 1, 0, 4)),
}


@pytest.mark.parametrize("form", ["dense", "channels_last", "channel slice"])
@pytest.mark.parametrize("label", SCALES)
def test_channel_scale_shapes(label, form):
    xs, ns = SCALES[label]
    if form == "channels_last" and len(xs) != 4:
        pytest.skip("no images")
    x, scale = cases.strided(torch.randn(xs), form), torch.randn(xs[0], 2 * xs[1])[:, ::2]
    noise = None if ns is None else torch.randn(ns)
    with cases.poisoned():
        cases.compare(OPS["channel_scale"], (x, scale, noise), FORWARD[torch.float32])
        for grad in (torch.randn(xs), torch.ones(()).expand(xs)):
            cases.compare(OPS["channel_scale_backward"], (grad, x, scale, noise), GRADIENT[torch.float32])


@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (2, 700, 1, 1), (1, 3, 11, 13), (0, 3, 3, 3), (2, 2, 0, 3)])
def test_tap_energy_shapes(shape):
    with cases.poisoned():
        cases.compare(OPS["tap_energy"], (torch.randn(shape),), FORWARD[torch.float32])
