"""pixel_norm: layouts, axes, extremes, third derivatives, errors; and the module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import _registry, ops
from genfast.nn import PixelNorm

FORMS = {"dense": None, "channels_last": torch.channels_last}


def written_out(x, dim=1, eps=1e-8):
    return x / torch.sqrt((x**2).mean(dim=dim, keepdim=True) + eps)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.sampled_from([1, 2, 3, 5, 16, 33, 130, 513]),
    last=st.booleans(),
    positions=st.sampled_from([(), (1,), (300,), (2, 2), (5, 7), (33, 37), (2, 3, 5)]),
    eps=st.sampled_from([1e-8, 0.1]),
)
def test_equals_the_equation(n, c, positions, last, eps):
    shape = (n, c, *positions)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if last else None
    x = torch.randn(shape)
    x = (x if form is None else x.contiguous(memory_format=form)).requires_grad_()
    y = ops.pixel_norm(x, eps=eps)
    expected = written_out(x.double(), eps=eps)
    if form is not None and min(y.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=form)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)
    weights = torch.randn(y.shape)
    found, exact = (torch.autograd.grad(t, x, w)[0] for t, w in ((y, weights), (expected, weights.double())))
    scale = (
        1 / ((x.detach().double() ** 2).mean(1, keepdim=True) + eps).sqrt()
    )  # where C is 1 all but eps / x^2 cancels
    assert float((found - exact).norm()) <= 1e-6 * float((scale * weights).norm())


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_x_and_gradient(form):
    big = torch.randn(3, 24, 12, 10)
    x = (
        (big if FORMS[form] is None else big.contiguous(memory_format=FORMS[form]))[:, 6:18, ::2]
        .detach()
        .requires_grad_()
    )
    for weights in (torch.randn(3, 1, 6, 10).expand(3, 12, 6, 10), torch.randn(6, 10, 3, 12).permute(2, 3, 0, 1)):
        results = []
        for function in (ops.pixel_norm, written_out):
            y = function(x)
            first = torch.autograd.grad(y, x, weights, create_graph=True)[0]
            results.append([y, first, torch.autograd.grad(first.square().sum(), x)[0]])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (7,), (4, 5)])
def test_any_axis(shape):
    for dim in range(-len(shape), len(shape)):
        for x in (torch.randn(shape).double(), torch.randn(shape[::-1]).double().permute(*range(len(shape))[::-1])):
            torch.testing.assert_close(ops.pixel_norm(x, dim=dim), written_out(x, dim))


def test_unit_mean_square_and_indifference_to_scale():
    x = torch.randn(3, 7, 5, 4)
    y = ops.pixel_norm(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(3, 5, 4))
    torch.testing.assert_close(ops.pixel_norm(1000 * x), y)
    torch.testing.assert_close(ops.pixel_norm(x.flip(1)), y.flip(1))


@pytest.mark.parametrize("shape", [(2, 5, 3), (3, 6)])
def test_third_derivatives(shape):
    """Along random directions, against those of the equation by PyTorch."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights, results = [torch.randn_like(x) for _ in range(3)], []
    for function in (ops.pixel_norm, written_out):
        out, found = function(x), []
        for w in weights:
            out = torch.autograd.grad((out.square() * w).sum() + (out * w).sum(), x, create_graph=True)[0]
            found.append(out)
        results.append(found)
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_backward_itself():
    d, x = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    op = _registry.OPS["pixel_norm_backward"]
    assert torch.autograd.gradcheck(lambda d, x: op(d, x, 1e-2), (d, x))
    assert torch.autograd.gradgradcheck(lambda d, x: op(d, x, 1e-2), (d, x))


@pytest.mark.parametrize("shape", [(1, 6, 3), (3, 6)])
def test_extremes(shape):
    for scale in (0.0, 1e-30, 1e-10, 1e15):
        x = (scale * torch.randn(shape)).requires_grad_()
        y = ops.pixel_norm(x)
        torch.testing.assert_close(y.double(), written_out(x.double()), rtol=2e-6, atol=1e-30)
        weights = torch.randn(shape)
        found, exact = (
            torch.autograd.grad(t, x, w)[0] for t, w in ((y, weights), (written_out(x.double()), weights.double()))
        )
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = math.nan
    assert ops.pixel_norm(x).isnan().nonzero().tolist() == [[1, c, 3] for c in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_the_rounding_of_equal_terms_does_not_add_up(form):
    x = torch.full((1, 2000, 3, 5), 0.1)
    x = x if FORMS[form] is None else x.contiguous(memory_format=FORMS[form])
    torch.testing.assert_close(ops.pixel_norm(x).double(), written_out(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_thread_count_does_not_change_the_bits(form):
    x = torch.randn(3, 64, 33, 31)
    x = (x if FORMS[form] is None else x.contiguous(memory_format=FORMS[form])).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.pixel_norm(x)
            results.append((y, torch.autograd.grad(y.pow(3).sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_saves_only_its_input():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.pixel_norm(x)
    assert saved == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0, 4), (2, 0, 3)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    y = ops.pixel_norm(x)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_half_types_are_summed_in_float32():
    x = (300 * torch.randn(2, 40, 5)).half()  # squares overflow float16
    torch.testing.assert_close(ops.pixel_norm(x).double(), written_out(x.double()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(2, 3), {"dim": 2}, ValueError, r"dim=2 of x with shape \(2, 3\), expected one of its 2 axes"),
        (torch.zeros(()), {}, ValueError, r"dim=1 of x with shape \(\), expected one of its 0 axes"),
        (torch.zeros(2, 3), {"dim": None}, TypeError, "dim=None, expected an int"),
        (torch.zeros(2, 3), {"eps": 0}, ValueError, r"eps=0\.0, expected a positive number"),
        (torch.zeros(2, 3), {"eps": math.nan}, ValueError, "eps=nan"),
        (torch.zeros(2, 3).long(), {}, TypeError, r"x has dtype torch\.int64, expected a floating-point dtype"),
        ([1.0], {}, TypeError, "x is a list"),
    ],
)
def test_errors(x, options, error, message):
    with pytest.raises(error, match=message):
        ops.pixel_norm(x, **options)


def test_errors_of_the_raw_op_and_of_a_forced_backend():
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(N, C, ...\)"):
        _registry.OPS["pixel_norm"](torch.zeros(3), 1e-8)
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match=r"takes float32, float64, not float16"):
        ops.pixel_norm(torch.zeros(2, 8).half())


def test_module():
    layer = PixelNorm(dim=-1, eps=1e-3)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), written_out(x, -1, 1e-3))
    assert not layer.state_dict()
    assert repr(layer) == "PixelNorm(dim=-1, eps=0.001)"
