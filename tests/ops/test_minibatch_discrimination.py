"""minibatch_discrimination: the paper's sum, ties, memory, any order of derivatives, threads, errors, the module."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import nn as gnn
from genfast import ops, reference
from genfast._peak_memory import peak_bytes
from genfast._registry import OPS
from tests.conftest import poisoned


def written_out(m, include_self=True):
    """Section 3.2, pair by pair."""
    n = len(m)
    rows = []
    for i in range(n):
        row = m.new_zeros(m.shape[1])
        for j in range(n):
            if include_self or j != i:
                row = row + torch.exp(-(m[i] - m[j]).abs().sum(1))
        rows.append(row)
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 7, 8, 13, 24, 33]),
    b=st.sampled_from([1, 2, 7, 16, 17, 35]),
    c=st.sampled_from([1, 2, 5, 19]),
    include_self=st.booleans(),
)
def test_equals_the_definition(n, b, c, include_self):
    m = (torch.randn(n, b, c) / c).requires_grad_()
    exact = m.detach().double().requires_grad_()
    with poisoned():
        found = ops.pairwise_l1_kernel_sum(m, include_self=include_self)
        expected = written_out(exact, include_self)
        assert float((found - expected).norm()) <= 2e-6 * float(expected.norm())
        weights, direction = torch.randn(n, b), torch.randn(n, b, c)
        weights.requires_grad_()
        (first,) = torch.autograd.grad(found, m, weights, create_graph=True)
        second = torch.autograd.grad(first, (m, weights), direction)
    if n == 1:
        assert not first.any()
        assert not any(bool(s.any()) for s in second)
        return
    wide = weights.detach().double().requires_grad_()
    (first_exact,) = torch.autograd.grad(expected, exact, wide, create_graph=True)
    second_exact = torch.autograd.grad(first_exact, (exact, wide), direction.double())
    for f, e in ((first, first_exact), *zip(second, second_exact)):
        assert float((f - e).norm()) <= 5e-6 * float(e.norm()) + 1e-7


def test_blocks_of_the_reference_make_no_difference(monkeypatch):
    """The reference takes a few rows at a time."""
    module = importlib.import_module("genfast.reference.minibatch_discrimination")
    m, g, t = (torch.randn(s, dtype=torch.float64) for s in ((9, 3, 4), (9, 3), (9, 3, 4)))
    functions = (
        lambda: (module.pairwise_l1_kernel_sum(m, True),),
        lambda: (module.pairwise_l1_kernel_sum(m, False),),
        lambda: (module.pairwise_l1_kernel_sum_backward(m, g),),
        lambda: module.pairwise_l1_kernel_sum_second_backward(m, g, t),
    )
    whole = [f() for f in functions]
    monkeypatch.setattr(module, "ELEMENTS", 2 * m.numel())
    for f, expected in zip(functions, whole):
        for a, b in zip(f(), expected):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole[1][0], written_out(m, False))


def test_the_product_is_x_times_the_weight():
    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(8, 5, 3, dtype=torch.float64) / 3
    m = torch.stack(
        [torch.stack([torch.stack([x[i] @ weight[:, b, c] for c in range(3)]) for b in range(5)]) for i in range(6)]
    )
    found = ops.minibatch_discrimination(x, weight)
    torch.testing.assert_close(found, written_out(m))
    torch.testing.assert_close(found, reference.minibatch_discrimination(x, weight))
    torch.testing.assert_close(ops.minibatch_discrimination(x, weight, include_self=False), written_out(m, False))


def test_permuting_the_batch_permutes_the_output():
    m, order = torch.randn(13, 6, 4, dtype=torch.float64) / 4, torch.randperm(13)
    torch.testing.assert_close(ops.pairwise_l1_kernel_sum(m[order]), ops.pairwise_l1_kernel_sum(m)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_have_no_slope(dtype):
    """Equal features: sign(0) = 0, in every derivative, also where others of the same pair differ."""
    m = torch.randn(6, 3, 4, dtype=dtype)
    m[2] = m[0]
    m[3, :, 1] = m[0, :, 1]
    m = m.requires_grad_()
    for include_self in (True, False):
        g = torch.randn(6, 3, dtype=dtype)
        direction = torch.randn_like(m)
        results = []
        for o in (ops.pairwise_l1_kernel_sum(m, include_self=include_self), written_out(m, include_self)):
            (first,) = torch.autograd.grad(o, m, g, create_graph=True)
            results.append((first, *torch.autograd.grad(first, m, direction)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    same = torch.randn(1, 3, 4, dtype=dtype).repeat(9, 1, 1).requires_grad_()
    o = ops.pairwise_l1_kernel_sum(same)
    assert torch.equal(o, torch.full_like(o, 9))
    assert not torch.autograd.grad(o.sum(), same)[0].any()


def test_derivatives_of_every_order():
    m = torch.randn(
        5, 2, 3, dtype=torch.float64, requires_grad=True
    )  # without ties, and far from them for a step of 1e-6

    for include_self in (True, False):

        def function(m, include_self=include_self):
            return ops.pairwise_l1_kernel_sum(m, include_self=include_self)

        assert torch.autograd.gradcheck(function, (m,))
        assert torch.autograd.gradgradcheck(function, (m,))

        def second(m, function=function):
            (first,) = torch.autograd.grad(function(m).pow(3).sum(), m, create_graph=True)
            return torch.autograd.grad(first.pow(2).sum(), m, create_graph=True)

        assert torch.autograd.gradcheck(second, (m,))
        assert torch.autograd.gradgradcheck(second, (m,))


def test_a_gradient_penalty_differentiates_it_where_cdist_does_not():
    """The published trap: torch.cdist's backward has no derivative."""
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64) / 2

    def penalty(layer, weight):
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(at, weight).pow(2).sum(), at, create_graph=True)
        return (ops.sample_norm(g) - 1).square().mean()

    def by_cdist(x, weight):
        m = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:]).transpose(0, 1).contiguous()
        return (-torch.cdist(m, m, p=1)).exp().sum(2).T

    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: penalty(ops.minibatch_discrimination, w), (weight,))
    torch.testing.assert_close(by_cdist(x, weight), ops.minibatch_discrimination(x, weight))
    with pytest.raises(RuntimeError, match="not implemented|not differentiable|does not require grad"):
        torch.autograd.grad(penalty(by_cdist, weight), weight)


def test_memory_grows_with_the_batch_and_not_with_its_square():
    peaks = []
    for n in (256, 512):
        m, g, t = torch.randn(n, 20, 8, requires_grad=True), torch.randn(n, 20), torch.randn(n, 20, 8)

        def work(m=m, g=g, t=t):
            (first,) = torch.autograd.grad(ops.pairwise_l1_kernel_sum(m), m, g, create_graph=True)
            return torch.autograd.grad(first, m, t)

        peaks.append(peak_bytes(work, "cpu"))
        assert peaks[-1] < 8 * m.numel() * 4  # an array over pairs and kernels alone is n / 8 times that
    assert peaks[1] < 2.5 * peaks[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 100.0, 1e30])
def test_extremes(scale):
    m = (torch.randn(12, 5, 3) * scale).requires_grad_()
    o = ops.pairwise_l1_kernel_sum(m)
    torch.testing.assert_close(o.double(), written_out(m.double()), rtol=1e-5, atol=1e-6)
    (first,) = torch.autograd.grad(o.sum(), m, create_graph=True)
    assert bool(first.isfinite().all())
    assert bool(torch.autograd.grad(first.sum(), m)[0].isfinite().all())


def test_not_a_number_stays_in_its_kernel():
    m = torch.randn(6, 3, 2)
    m[2, 1, 0] = math.nan
    for backend in ("cpu", "reference"):
        with genfast.backend(backend):
            o = ops.pairwise_l1_kernel_sum(m)
        assert bool(o[:, 1].isnan().all())
        assert bool(o[:, [0, 2]].isfinite().all())
    assert bool(ops.pairwise_l1_kernel_sum(torch.full((1, 1, 1), math.inf)).isnan().all())


def test_strides():
    m = torch.randn(7, 4, 10)[..., ::2].detach().requires_grad_()
    swapped = torch.randn(4, 7, 5).transpose(0, 1).detach().requires_grad_()
    for t in (m, swapped):
        results = []
        for function in (ops.pairwise_l1_kernel_sum, written_out):
            o = function(t)
            (first,) = torch.autograd.grad(o, t, torch.arange(8.0)[::2].expand(7, 4), create_graph=True)
            results.append((o, first, *torch.autograd.grad(first, t, torch.ones(()).expand(7, 4, 5))))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_half_types_give_float32():
    m = (torch.randn(8, 4, 5) / 5).bfloat16().requires_grad_()
    o = ops.pairwise_l1_kernel_sum(m)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o, written_out(m.float()))
    (first,) = torch.autograd.grad(o.sum(), m, create_graph=True)
    assert first.dtype == torch.bfloat16
    assert torch.autograd.grad(first.sum(), m)[0].dtype == torch.bfloat16


def test_opcheck_of_the_backwards():
    m, g, t = (torch.randn(s, requires_grad=True) for s in ((5, 3, 2), (5, 3), (5, 3, 2)))
    torch.library.opcheck(OPS["pairwise_l1_kernel_sum_backward"].overload, (m, g))
    torch.library.opcheck(OPS["pairwise_l1_kernel_sum_second_backward"].overload, (m, g, t))


def test_the_thread_count_does_not_change_the_bits():
    for shape in ((96, 40, 5), (130, 3, 7)):
        m = torch.randn(shape, requires_grad=True)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                o = ops.pairwise_l1_kernel_sum(m)
                (first,) = torch.autograd.grad(o.square().sum(), m, create_graph=True)
                results.append((o, first, torch.autograd.grad(first.square().sum(), m)[0]))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("include_self", [True, False])
def test_empty(shape, include_self):
    m = torch.randn(shape, requires_grad=True)
    for backend in ("cpu", "reference"):
        with genfast.backend(backend):
            o = ops.pairwise_l1_kernel_sum(m, include_self=include_self)
            assert o.shape == shape[:2]
            if o.numel():  # no features: every kernel is 1
                assert bool((o == shape[0] - (not include_self)).all())
            (first,) = torch.autograd.grad(o.sum(), m, create_graph=True)
            assert first.shape == shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pairwise_l1_kernel_sum(torch.ones(2, 3)), ValueError, r"m has shape \(2, 3\), expected \(N, B, "
        r"C\)"),
        (lambda: ops.pairwise_l1_kernel_sum(torch.ones(2, 3, 4).long()), TypeError, r"m has dtype torch\.int64"),
        (lambda: ops.pairwise_l1_kernel_sum([1]), TypeError, "m is a list"),
        (
            lambda: ops.minibatch_discrimination(torch.ones(2, 3, 4), torch.ones(3, 4, 5)), ValueError,
            r"x has shape \(2, 3, 4\), expected \(N, A\); flatten",
        ),
        (
            lambda: ops.minibatch_discrimination(torch.ones(2, 3), torch.ones(4, 4, 5)), ValueError,
            r"weight has shape \(4, 4, 5\), expected \(3, B, C\)",
        ),
        (lambda: ops.minibatch_discrimination(torch.ones(2, 3), torch.ones(3, 4)), ValueError,
        r"weight has shape \(3, 4\)"),
        (
            lambda: ops.minibatch_discrimination(torch.ones(2, 3), torch.ones(3, 4, 5).double()), TypeError,
            r"weight has dtype torch\.float64 and x torch\.float32, expected the same",
        ),
        (lambda: ops.minibatch_discrimination(torch.ones(2, 3).long(), torch.ones(3, 4, 5)), TypeError, r"x has dtype"),
        (lambda: gnn.MinibatchDiscrimination(0, 1, 1), ValueError, "in_features=0, expected at least 1"),
        (lambda: gnn.MinibatchDiscrimination(3, 1, 0), ValueError, "kernel_dims=0, expected at least 1"),
        (lambda: gnn.MinibatchDiscrimination(3, 1, 2)(torch.ones(2, 4)), ValueError, r"expected \(4, B, C\)"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- the module ----


@pytest.mark.parametrize("include_self", [True, False])
def test_the_module_appends(include_self):
    layer = gnn.MinibatchDiscrimination(8, 5, 3, include_self=include_self)
    x = torch.randn(6, 8)
    y = layer(x)
    assert torch.equal(y[:, :8], x)
    assert torch.equal(y[:, 8:], ops.minibatch_discrimination(x, layer.weight, include_self=include_self))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y)
    assert repr(layer) == f"MinibatchDiscrimination(8, 5, 3, include_self={include_self})"


def test_the_module_tells_a_collapsed_batch():
    """What it is for: identical samples stand out from different ones."""
    layer = gnn.MinibatchDiscrimination(16, 10, 5)
    different, same = torch.randn(32, 16), torch.randn(1, 16).expand(32, 16)
    assert float(layer(same)[:, 16:].mean()) == 32
    assert float(layer(different)[:, 16:].mean()) < 4


def test_the_module_in_half_types_and_under_autocast():
    layer, x = gnn.MinibatchDiscrimination(8, 5, 3), torch.randn(6, 8)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), rtol=3e-2, atol=3e-2)


def test_the_module_compiles_without_a_break():
    layer, x = gnn.MinibatchDiscrimination(8, 5, 3), torch.randn(6, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    a, b = compiled(x), layer(x)
    torch.testing.assert_close(a, b)
    for f, e in zip(*(torch.autograd.grad(y.square().sum(), (x, layer.weight)) for y in (a, b))):
        torch.testing.assert_close(f, e)
