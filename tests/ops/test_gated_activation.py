"""gated_activation: layouts, ways to condition, colour groups, extremes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops

FORMS = {"dense": None, "channels_last": torch.channels_last}


def written_out(x, bias, groups):
    """Equation 2, block by block."""
    if bias is not None:
        x = x + (bias if bias.dim() == x.dim() else bias.reshape(*bias.shape, *[1] * (x.dim() - max(bias.dim(), 2))))
    blocks = [block.chunk(2, dim=1) for block in x.chunk(groups, dim=1)]
    return torch.cat([f.tanh() * g.sigmoid() for f, g in blocks], 1)


def spread(x, kind):
    return {"none": None, "all": (x[1],), "sample": x[:2], "spatial": x}[kind]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    c=st.sampled_from([1, 2, 5, 16, 33]),
    positions=st.sampled_from([(), (1,), (300,), (5, 7), (4, 16), (28, 28), (2, 3, 5)]),
    kind=st.sampled_from(["none", "all", "sample", "spatial"]),
    last=st.booleans(),
)
def test_equals_the_equation(n, groups, c, positions, kind, last):
    shape = (n, 2 * c * groups, *positions)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if last else None
    x = torch.randn(shape)
    x = (x if form is None else x.contiguous(memory_format=form)).requires_grad_()
    bias = spread(shape, kind)
    bias = None if bias is None else torch.randn(bias, requires_grad=True)
    inputs = [t for t in (x, bias) if t is not None]
    y = ops.gated_activation(x, bias, groups=groups)
    expected = written_out(x.double(), None if bias is None else bias.double(), groups)
    assert y.shape == expected.shape
    if form is not None and min(y.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=form)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)
    weights = torch.randn(y.shape)
    grads = torch.autograd.grad(y, inputs, weights)
    for found, exact in zip(grads, torch.autograd.grad(expected, inputs, weights.double())):
        assert float((found - exact).norm()) <= 1e-6 * float(exact.norm()) + 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "all", "sample", "spatial"])
def test_strides_of_x_bias_and_gradient(form, kind):
    shape = (3, 12, 6, 10)
    big = torch.randn(3, 24, 12, 10)
    x = (big if FORMS[form] is None else big.contiguous(memory_format=FORMS[form]))[:, 6:18, ::2]
    bias = spread(shape, kind)
    bias = None if bias is None else torch.randn(*bias, 2)[..., 0]
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    for weights in (
        torch.randn(3, 5, 6, 10).permute(0, 1, 2, 3)[:, :1].expand(3, 6, 6, 10),
        torch.randn(6, 10, 3, 6).permute(2, 3, 0, 1),
    ):
        results = []
        for function in (lambda *t: ops.gated_activation(*t, groups=3), lambda *t: written_out(t[0], (*t, None)[1], 3)):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, weights)])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_groups_do_not_mix():
    x = torch.randn(1, 12, 3, 3, requires_grad=True)
    y = ops.gated_activation(x, groups=3)
    for group in range(3):
        grad = torch.autograd.grad(y[:, 2 * group : 2 * group + 2].sum(), x, retain_graph=True)[0]
        touched = grad[0].flatten(1).ne(0).any(1)
        assert touched.tolist() == [i // 4 == group for i in range(12)]


def test_saves_only_its_inputs():
    x, bias = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.gated_activation(x, bias)
    assert sorted(saved) == sorted((x.data_ptr(), bias.data_ptr()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extremes(dtype):
    v = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 0.1, 1.0, 5.0, 9.0, 20.0, 60.0, 300.0, 1e30, math.inf], dtype=dtype)
    v = torch.cat((v, -v))
    f, g = (t.reshape(-1, 1) for t in torch.meshgrid(v, v, indexing="ij"))
    x = torch.cat((f, g), 1).requires_grad_()
    y = ops.gated_activation(x)
    exact = written_out(x.detach().double(), None, 1)
    ordinary = exact.abs() > torch.finfo(dtype).tiny
    assert float(((y.detach().double() - exact) / exact)[ordinary].abs().max()) < 8 * torch.finfo(dtype).eps
    assert float(y.detach()[~ordinary].abs().max()) <= torch.finfo(dtype).tiny
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert bool(grad.isfinite().all())
    e, s = torch.cosh(f.double()) ** -2, g.double().sigmoid()
    exact = torch.cat((e * s, f.double().tanh() * s * (-g.double()).sigmoid()), 1)
    assert float((grad - exact).abs().max()) < 4 * torch.finfo(dtype).eps


def test_not_a_number_stays_in_place():
    x = torch.randn(1, 4, 2, 3)
    x[0, 0, 0, 1], x[0, 3, 1, 2] = math.nan, math.nan
    assert ops.gated_activation(x).isnan().nonzero().tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]


def test_a_bias_of_another_dtype():
    x, bias = torch.randn(2, 6, 4).bfloat16().requires_grad_(), torch.randn(2, 6, requires_grad=True)
    y = ops.gated_activation(x, bias)
    assert y.dtype == torch.bfloat16
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert (dx.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)
    y = ops.gated_activation(x.float(), bias.double())
    assert y.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_the_thread_count_does_not_change_the_bits(form):
    x = torch.randn(3, 32, 33, 31)
    x = (x if FORMS[form] is None else x.contiguous(memory_format=FORMS[form])).requires_grad_()
    before = torch.get_num_threads()
    try:
        for shape in ((32,), (3, 32)):
            bias, results = torch.randn(shape, requires_grad=True), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                y = ops.gated_activation(x, bias)
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
            assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0, 4)])
@pytest.mark.parametrize("kind", ["none", "all", "sample", "spatial"])
def test_empty(shape, kind):
    x = torch.randn(shape, requires_grad=True)
    bias = spread(shape, kind)
    inputs = (x,) if bias is None else (x, torch.randn(bias, requires_grad=True))
    y = ops.gated_activation(*inputs)
    assert y.shape == (shape[0], 3, *shape[2:])
    for g, t in zip(torch.autograd.grad(y.sum(), inputs), inputs):
        assert g.shape == t.shape
        assert not g.any()


@pytest.mark.parametrize(
    ("x", "bias", "options", "error", "message"),
    [
        ((2, 5, 4), None, {}, ValueError, r"x has shape \(2, 5, 4\), expected \(N, 2C, .*that is even"),
        ((2, 8, 4), None, {"groups": 3}, ValueError, r"a multiple of 2 groups = 6"),
        ((2, 0, 4), None, {}, ValueError, r"x has shape \(2, 0, 4\)"),
        ((8,), None, {}, ValueError, r"x has shape \(8,\)"),
        ((2, 8, 4), None, {"groups": 0}, ValueError, "groups=0, expected at least 1"),
        ((2, 8, 4), (4,), {}, ValueError, r"bias has shape \(4,\), expected \(8,\), \(2, 8\) or x's shape \(2, 8, 4\)"),
        ((2, 8, 4), (2, 8, 1), {}, ValueError, r"bias has shape \(2, 8, 1\)"),
        ((2, 8, 4), (8,), {"dtype": torch.int64}, TypeError, r"bias has dtype torch\.int64, expected a floating-point"),
    ],
)
def test_errors(x, bias, options, error, message):
    options = dict(options)
    bias = None if bias is None else torch.zeros(bias, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(error, match=message):
        ops.gated_activation(torch.zeros(x), bias, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        ops.gated_activation(torch.zeros(2, 8).long())
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match=r"takes float32, float64, not float16"):
        ops.gated_activation(torch.zeros(2, 8).half())
