"""The Triton kernels of the masked convolution in Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from genfast.kernels import masked_conv as kernels
from tests.triton import masked_conv_cases as cases
from tests.triton.flow_cases import DTYPES, FORMS, strided

FLOAT = dict(dtype=torch.float32)


@pytest.mark.parametrize("label", cases.CASES)
def test_masked_conv_shapes(label):
    cases.check(cases.arguments(label, FLOAT))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("label", ["first layer", "primes", "groups", "1x1", "empty batch"])
def test_masked_conv_half_types(label, dtype):
    cases.check(cases.arguments(label, dict(dtype=dtype)))


def test_masked_conv_float32_weight_of_a_half_image():
    a = cases.arguments("primes", FLOAT)
    y, dx, dweight, dbias = cases.check(a | dict(x=a["x"].bfloat16()))
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("label", ["first layer", "primes"])
def test_masked_conv_strides(label, form):
    a = cases.arguments(label, FLOAT)
    y, dx, *_ = cases.check(
        a | dict(x=strided(a["x"], form)), strided(torch.randn(a["x"].shape[0], *a["bias"].shape, 5, 7), form)
    )
    last = form == "channels_last"
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize(("form", "other"), [("dense", "channels_last"), ("channels_last", "dense")])
def test_masked_conv_gradient_laid_out_otherwise(form, other):
    a = cases.arguments("primes", FLOAT)
    for activation in ("relu", "none"):
        cases.check(a | dict(x=strided(a["x"], form), activation=activation), strided(torch.randn(3, 13, 5, 7), other))


def test_masked_conv_expanded_gradient():
    a = cases.arguments("primes", FLOAT) | dict(activation="none")
    cases.check(a, torch.ones(()).expand(3, 13, 5, 7))  # what y.sum() sends back


@pytest.mark.parametrize("form", ["channels_last", "column slice", "transposed", "batch behind channels"])
def test_masked_conv_weight_strides(form):
    a = cases.arguments("groups", FLOAT)
    _, _, dweight, _ = cases.check(a | dict(weight=strided(a["weight"], form), bias=torch.randn(2 * 24)[::2]))
    assert dweight.is_contiguous()


@pytest.mark.parametrize("label", ["first layer", "groups"])
def test_masked_conv_tf32(label):
    """The layouts of the product on tensor cores; the interpreter multiplies in float32 either way."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert kernels.precision(torch.zeros(1)) == "tf32"
        cases.check(cases.arguments(label, FLOAT))
    finally:
        torch.set_float32_matmul_precision(before)
    assert kernels.precision(torch.zeros(1)) == "ieee"


@pytest.mark.parametrize("label", ["primes", "sequence, last tap"])
def test_masked_conv_half_types_transposed_for_the_weight_gradient(label, monkeypatch):
    monkeypatch.setattr(kernels, "TRANSPOSE_FROM", 1)
    cases.check(cases.arguments(label, dict(dtype=torch.float16)))


def test_masked_conv_volume_channels_last():
    a = cases.arguments("volume", FLOAT)
    y, *_ = cases.check(a | dict(x=a["x"].contiguous(memory_format=torch.channels_last_3d)))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("label", ["row", "first layer", "groups"])
def test_masked_conv_64_bit_offsets(label, monkeypatch):
    image = kernels.image
    monkeypatch.setattr(kernels, "image", lambda x: image(x)._replace(far=True))
    cases.check(cases.arguments(label, FLOAT))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_masked_conv_only_what_is_wanted(wanted):
    for activation in ("relu", "none"):
        cases.check(cases.arguments("one element, A", FLOAT) | dict(activation=activation), wanted=list(wanted))


@pytest.mark.parametrize("label", ["first layer", "rows above and the row", "dilated"])
def test_masked_conv_never_sees_what_comes_later(label):
    """NaN from pixel q on: every output before q is what it was, also where a step of the product has unused rows."""
    a = cases.arguments(label, FLOAT)
    rest = [
        a[name] for name in ("weight", "bias", "mask_type", "g", "order", "dilation", "groups", "center", "activation")
    ]
    before = kernels.masked_conv(a["x"], *rest).flatten(2)
    for q in (7, 18):
        x = a["x"].clone()
        x.flatten(2)[:, :, q:] = math.nan
        y = kernels.masked_conv(x, *rest).flatten(2)
        assert torch.equal(y[:, :, :q], before[:, :, :q])
        assert bool(y[:, :, q + 1 :].isnan().any())


def test_masked_conv_colours_see_only_what_comes_before_them():
    """With g colours and NaN in one of them, the centre tap of a 1x1 kernel carries it to later ones alone: sizes, not
    NaN."""
    for order, mask_type in itertools.product(("interleaved", "blocked"), "AB"):
        weight = torch.ones(6, 9, 1, 1)
        y = kernels.masked_conv(torch.ones(1, 9, 1, 1), weight, None, mask_type, 3, order, [1, 1], 1, [0, 0], "none")
        colour = torch.arange(6) % 3 if order == "interleaved" else torch.arange(6) // 2
        assert torch.equal(y.flatten(), 3.0 * (colour + (mask_type == "B")))


def test_masked_conv_relu_keeps_nan():
    a = cases.arguments("1x1", FLOAT)
    a["x"][0, :, 2, 3] = math.nan
    y = kernels.masked_conv(a["x"], a["weight"], a["bias"], "B", 3, "blocked", [1, 1], 1, [0, 0], "relu")
    assert bool(y[0, :, 2, 3].isnan().all())


def test_masked_conv_no_positions():
    x, weight = torch.randn(2, 3, 0, 5), torch.randn(6, 3, 3, 3)
    rest = ("B", 1, "interleaved", [1, 1], 1, [1, 1], "relu")
    y = kernels.masked_conv(x, weight, None, *rest)
    assert y.shape == (2, 6, 0, 5)
    dx, dweight, dbias = kernels.masked_conv_backward(y, x, weight, y, *rest, cases.ALL)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros(6))


@triton.jit
def _quotients(p, q, magic, shift, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(q + i, kernels._divide(tl.load(p + i), magic, shift))


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 28, 32, 784, 1000, 65537, 2**30 - 1, 2**31 - 1])
def test_masked_conv_division_by_multiplication(d):
    near = [m * d + e for m in (1, 2, 3, (2**31 - 1) // d) for e in (-1, 0, 1)]
    p = torch.tensor(
        [p for p in near if 0 <= p < 2**31] + [0, 1, 2**31 - 1] + torch.randint(2**31 - 1, (256,)).tolist()
    )[:256]
    p = torch.cat((p, p.new_zeros(256 - len(p)))).to(torch.int32)
    q = torch.empty_like(p)
    _quotients[(1,)](p, q, *kernels._magic(d), N=256)
    assert torch.equal(q, p // d)


def test_masked_conv_dense_positions():
    x = torch.empty(2, 3, 4, 5)
    assert not kernels.image(x).dense
    assert kernels.image(x[:1]).dense
    assert kernels.image(x.contiguous(memory_format=torch.channels_last)).dense
    assert kernels.image(torch.ones(()).expand(2, 3, 4, 5)).dense
    assert not kernels.image(x.contiguous(memory_format=torch.channels_last)[..., :-1]).dense
    assert not kernels.image(x[:1].transpose(2, 3)).dense
