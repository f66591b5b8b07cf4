"""leaky_relu_bits, apply_bits, activation_chain, activation_second: layouts, in place, extremes, derivatives,
errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast.ops.activation import (
    KINDS,
    activation_chain,
    activation_second,
    apply_bits,
    apply_bits_,
    leaky_relu_bits,
    leaky_relu_bits_,
)
from genfast.reference.activation import SLOPES, memory_order, pack, unpack

SHAPES = [(), (1,), (7,), (63,), (64,), (65, 3), (2, 3, 5, 7), (4, 6, 33, 32), (2, 3, 2, 3, 5), (0, 4)]
MAPS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
}


def forms(x):
    yield x
    if x.dim() in (4, 5):
        yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if x.dim() >= 2:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)  # dense in an order of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leaky_relu_and_its_bits(shape, dtype):
    for x in forms(torch.randn(shape).to(dtype)):
        for slope in (0.0, 0.2):
            y, bits = leaky_relu_bits(x, slope)
            assert torch.equal(y, F.leaky_relu(x, slope) if slope else F.relu(x))
            assert bits.numel() == -(-x.numel() // 8)
            assert torch.equal(bits, pack(memory_order(y) > 0))
            assert not unpack(bits)[x.numel() :].any()
            d = torch.empty_like(y).normal_()
            assert d.stride() == y.stride()
            expected = torch.where(x > 0, d, d * slope)
            assert torch.equal(apply_bits(d, bits, slope), expected)
            assert torch.equal(apply_bits_(d, bits, slope), expected)
            assert torch.equal(d, expected)
            z = x.clone()
            assert torch.equal(leaky_relu_bits_(z, slope), bits)
            assert torch.equal(z, y)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 140), st.sampled_from([0.0, 0.3]))
def test_bits_of_rows(rows, columns, slope):
    x, bits = torch.randn(rows, columns), torch.randint(256, (rows, -(-columns // 8)), dtype=torch.uint8)
    on = unpack(bits).view(rows, 8 * bits.shape[1])[:, :columns]
    assert torch.equal(apply_bits(x, bits, slope), torch.where(on, x, x * slope))
    assert torch.equal(apply_bits(x.t().contiguous().t(), bits, slope), torch.where(on, x, x * slope))


def test_strided_in_place_calls_leave_the_rest_alone():
    big = torch.randn(8, 20)
    kept, x = big.clone(), big[::2, 1::2]
    bits = leaky_relu_bits_(x, 0.1)
    assert torch.equal(x, F.leaky_relu(kept[::2, 1::2], 0.1))
    assert torch.equal(big[1::2], kept[1::2])
    assert torch.equal(bits, pack(kept[::2, 1::2] > 0))


def test_outputs_past_the_cache():
    x = torch.randn(3, 1500007)  # 17 MiB, streamed
    y, bits = leaky_relu_bits(x, 0.2)
    assert torch.equal(y, F.leaky_relu(x, 0.2))
    assert torch.equal(bits, pack(x > 0))
    assert torch.equal(apply_bits(x, bits, 0.2), y)
    found, expected = activation_chain(x, y, "silu"), torch.ops.aten.silu_backward(y, x)
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_what_is_not_finite():
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0])
    for slope in (0.0, 0.2):
        y, bits = leaky_relu_bits(x, slope)
        torch.testing.assert_close(y, F.leaky_relu(x, slope) if slope else F.relu(x), equal_nan=True)
        assert bits.tolist() == [1]
    none = torch.zeros(1, dtype=torch.uint8)
    assert apply_bits(x, none, 0.0).tolist() == [0] * 5


def test_leaky_relu_through_any_derivative():
    values = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for form in (torch.contiguous_format, torch.channels_last):
        x = values.clone(memory_format=form).requires_grad_()

        def twice(x):
            (g,) = torch.autograd.grad((leaky_relu_bits(x, 0.2)[0] ** 3).sum(), x, create_graph=True)
            return torch.autograd.grad((g**2).sum(), x, create_graph=True)[0]

        assert torch.autograd.gradcheck(twice, (x,))
        plain = F.leaky_relu(x, 0.2)
        grad = torch.randn(2, 3, 4, 4, dtype=torch.float64)  # NCHW, whatever x is
        found = torch.autograd.grad(leaky_relu_bits(x, 0.2)[0], x, grad)[0]
        assert torch.equal(found, torch.autograd.grad(plain, x, grad)[0])


# ---- smooth activations ----


def derivatives(kind, x):
    x = x.double().requires_grad_()
    (first,) = torch.autograd.grad(MAPS[kind](x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return first.detach(), second.detach()


def error(found, exact):
    return float((found.double() - exact).norm().detach() / exact.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_slopes_are_those_of_torch(kind, dtype, bound):
    for shape in ((5,), (3, 6, 7, 5), (33, 64)):
        for x in forms((3 * torch.randn(shape)).to(dtype)):
            g, t, c = (torch.randn(shape, dtype=dtype) for _ in range(3))
            first, second = derivatives(kind, x)
            assert error(activation_chain(x, g, kind), g.double() * first) <= bound
            assert error(activation_second(x, g, t, None, kind), g.double() * t * second) <= bound
            both = g.double() * t * second + c.double() * first
            assert error(activation_second(x, g, t, c, kind), both) <= bound
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                assert activation_chain(x, g, kind).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_slopes_element_by_element(kind, dtype):
    """Absolute error of each element, across the range of the maps and far outside."""
    x = torch.cat((torch.linspace(-30, 30, 20001), torch.tensor([0.0, 20.0, -1e30, 1e30, -math.inf, math.inf]))).to(
        dtype
    )
    one = torch.ones_like(x)
    exact = genfast.reference.activation.SLOPES[kind](x[:-4].double())
    bound = 1e-6 if dtype is torch.float32 else 5e-15
    for found, expected in zip(
        (activation_chain(x, one, kind), activation_second(x, one, one, None, kind)), exact, strict=True
    ):
        assert float((found[:-4].double() - expected).abs().max()) <= bound
        scale = 1.0507009873554805 if kind == "selu" else 1.0
        ends = [0, scale, 0, scale] if expected is exact[0] and kind not in ("tanh", "sigmoid") else [0] * 4
        assert float((found[-4:].double() - torch.tensor(ends, dtype=torch.float64)).abs().max()) <= 1e-7
    assert activation_chain(torch.full((3,), math.nan, dtype=dtype), torch.ones(3, dtype=dtype), kind).isnan().all()
    nan = activation_second(torch.full((3,), math.nan, dtype=dtype), *torch.ones(2, 3, dtype=dtype), None, kind)
    assert nan.isnan().all()


@pytest.mark.parametrize("kind", ["tanh", "gelu", "softplus"])
def test_third_derivatives(kind):
    x, g = (
        torch.randn(2, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 6, dtype=torch.float64, requires_grad=True),
    )

    def once(x, g):
        y = activation_chain(x, g, kind)
        return torch.autograd.grad((y**2).sum(), (x, g), create_graph=True)

    assert torch.autograd.gradgradcheck(once, (x, g), fast_mode=True)


def test_mixed_dtypes_and_half():
    x, g = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(activation_chain(x, g.double(), "silu"), activation_chain(x, g, "silu"))
    y = activation_chain(x.bfloat16(), g.bfloat16(), "silu")
    assert y.dtype == torch.bfloat16


def test_the_thread_count_does_not_change_the_bits():
    x, g = torch.randn(70001), torch.randn(70001)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*leaky_relu_bits(x, 0.2), activation_chain(x, g, "gelu")])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3"])
def test_lower_instruction_sets(level):
    program = f"""
import torch
from genfast import _cpu
from tests.ops import test_activation as tests
if not _cpu.isa().startswith({"baseline" if level == "base" else "x86-64-v3"!r}):
    raise SystemExit(5)
torch.manual_seed(0)
for shape in tests.SHAPES:
    tests.test_leaky_relu_and_its_bits(shape, torch.float32)
    tests.test_leaky_relu_and_its_bits(shape, torch.float64)
for kind in tests.KINDS:
    tests.test_slopes_element_by_element(kind, torch.float32)
    tests.test_slopes_element_by_element(kind, torch.float64)
tests.test_bits_of_rows()
"""
    environment = os.environ | {"GENFAST_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == 5:
        pytest.skip(f"this processor does not run {level}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_errors_name_the_argument():
    x, bits = torch.randn(4, 9), torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(TypeError, match="leaky_relu_bits: x has dtype torch.int64"):
        leaky_relu_bits(x.long())
    with pytest.raises(TypeError, match="apply_bits: bits is a torch.bool, expected a torch.uint8"):
        apply_bits(x, bits.bool())
    with pytest.raises(ValueError, match=r"apply_bits: bits has shape \(4,\), expected \(5,\)"):
        apply_bits(x, bits[:4])
    with pytest.raises(ValueError, match=r"apply_bits: bits has shape \(4, 1\), expected \(4, 2\)"):
        apply_bits_(x, torch.zeros(4, 1, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="leaky_relu_bits_: x requires a gradient"):
        leaky_relu_bits_(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="activation_chain: kind='relu', expected one of 'silu'"):
        activation_chain(x, x, "relu")
    with pytest.raises(ValueError, match=r"activation_chain: grad has shape \(3, 9\), expected \(4, 9\)"):
        activation_chain(x, x[:3], "silu")
    with pytest.raises(ValueError, match=r"activation_second: cotangent has shape \(4, 8\)"):
        activation_second(x, x, x, x[:, :8], "silu")
    with pytest.raises(TypeError, match="activation_second: tangent has dtype torch.int64"):
        activation_second(x, x, x.long(), None, "silu")


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_keep_their_digits_in_the_tails(kind):
    """Relative to each value: 1 - tanh^2 and the like, taken as differences, have none left there. The reference, in
    float64, is held to PyTorch's derivatives above."""
    x = torch.cat((torch.linspace(-12, 12, 961), torch.logspace(-6, 0, 61), -torch.logspace(-6, 0, 61)))
    exact = SLOPES[kind](x.double())
    one = torch.ones_like(x)
    for found, wanted in zip((activation_chain(x, one, kind), activation_second(x, one, one, None, kind)), exact):
        # A sum that crosses zero (silu, gelu, mish) is as exact as its terms are: those are of the order of e^-|x|
        # there.
        floor = torch.exp(-x.double().abs()) * 0.05 if kind in ("silu", "gelu_tanh", "mish", "sigmoid") else 0.0
        if kind == "gelu":
            floor = torch.exp(-x.double().square() / 2) * 0.05
        error = (found.double() - wanted).abs() / (wanted.abs() + floor).clamp_min(1e-30)
        assert float(error.max()) < 2e-5


def test_a_slope_that_requires_a_gradient_is_refused():
    x, bits = torch.ones(8), torch.tensor([3], dtype=torch.uint8)
    slope = torch.tensor(0.2, requires_grad=True)
    for call in (
        lambda: apply_bits(x, bits, slope),
        lambda: apply_bits_(x, bits, slope),
        lambda: leaky_relu_bits(x, slope),
        lambda: leaky_relu_bits_(x, slope),
    ):
        with pytest.raises(TypeError, match="slope is a tensor that requires a gradient"):
            call()
    assert torch.equal(apply_bits(x, bits, slope.detach()), apply_bits(x, bits, 0.2))
