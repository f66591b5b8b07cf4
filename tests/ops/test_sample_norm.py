"""sample_norm: layouts, zero, extremes, any order of derivatives, threads, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops
from genfast._registry import OPS
from tests.conftest import poisoned
from tests.triton.flow_cases import FORMS, strided


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    rest=st.sampled_from([(), (1,), (7,), (9001,), (3, 5), (4, 8, 8), (3, 65, 63), (2, 3, 4, 5)]),
    last=st.booleans(),
    squared=st.booleans(),
)
def test_equals_the_definition(n, rest, last, squared):
    form = {3: torch.channels_last, 4: torch.channels_last_3d}.get(len(rest)) if last else None
    x = torch.randn(n, *rest)
    x = (x if form is None else x.contiguous(memory_format=form)).requires_grad_()
    with poisoned():
        found = ops.sample_norm(x, squared=squared)
        weights = torch.randn(n)
        (dx,) = torch.autograd.grad(found, x, weights)
    exact = torch.stack([s.double().square().sum() for s in x])
    exact = exact if squared else exact.sqrt()
    assert found.shape == (n,)
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
    (dexact,) = torch.autograd.grad(exact, x, weights.double())
    torch.testing.assert_close(dx, dexact, rtol=1e-6, atol=1e-6)
    if form is not None:
        assert dx.is_contiguous(memory_format=form)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_any_layout(form, squared):
    x = strided(torch.randn(3, 4, 5, 7), form).detach().requires_grad_()
    found = ops.sample_norm(x, squared=squared)
    expected = x.flatten(1).square().sum(1) if squared else x.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, torch.arange(6.0)[::2])[0] for o in (found, expected)))


def test_it_is_each_samples_own():
    """Not one norm of the whole batch, and not one per pixel over the channels."""
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(ops.sample_norm(x), torch.stack([s.norm() for s in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_has_zero_derivatives_of_every_order(dtype):
    x = torch.zeros(3, 2, 5, dtype=dtype)
    x[1] = 1.0
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.sample_norm(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * torch.randn_like(x)).sum(), x, create_graph=True)
    (third,) = torch.autograd.grad((second * torch.randn_like(x)).sum(), x)
    for d in (first, second, third):
        assert bool(d.isfinite().all())
        assert not d[0].any()
        assert not d[2].any()
    assert bool(first[1].any())


def test_a_penalty_on_a_dead_critic_is_finite():
    """A ReLU that is shut everywhere: the gradient is zero, the penalty (0 - 1)^2, its gradient zero and not NaN."""
    weight = torch.randn(6, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad((x @ weight.T - 100).relu().sum(), x, create_graph=True)
    penalty = (ops.sample_norm(g) - 1).square().mean()
    assert float(penalty) == 1
    assert not torch.autograd.grad(penalty, weight)[0].any()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1.0, 1e18, 1e30, 1e37])
def test_extreme_float32(scale):
    x = (torch.randn(2, 3, 40).double() * scale).float().requires_grad_()
    found = ops.sample_norm(x)
    exact = x.detach().double().flatten(1).norm(dim=1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-7 if scale > 1e-38 else 1e-4, atol=0)
    (dx,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(dx.double(), x.detach().double() / exact[:, None, None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-150, 1e150, 1e200, 1e307])
def test_extreme_float64(scale):
    unit = torch.randn(2, 9000, dtype=torch.float64)
    found = ops.sample_norm(unit * scale * 1e-2)
    torch.testing.assert_close(found, (unit * 1e-2).norm(dim=1) * scale, rtol=1e-12 if scale > 1e-300 else 1e-3, atol=0)


def test_infinite_and_not_a_number():
    x = torch.tensor([[1.0, math.inf], [math.nan, 1.0], [1.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        for backend in ("cpu", "reference"):
            with genfast.backend(backend):
                found = ops.sample_norm(x.to(dtype))
            assert found[0] == math.inf
            assert bool(found[1].isnan())
            assert found[2] == 1


def test_cotangents_beyond_the_range_of_the_quotient():
    x = torch.full((1, 4), 1e-35, requires_grad=True)
    for g in (1e5, 1e-5):
        (dx,) = torch.autograd.grad(ops.sample_norm(x), x, torch.tensor([g]))
        torch.testing.assert_close(dx, torch.full((1, 4), g / 2))


def test_half_types_give_float32():
    x = torch.randn(3, 500).bfloat16().requires_grad_()
    found = ops.sample_norm(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float().norm(dim=1))
    assert torch.autograd.grad(found.sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("squared", [False, True])
def test_derivatives_of_every_order(squared):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        return ops.sample_norm(x, squared=squared)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))

    def second(x):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)

    assert torch.autograd.gradcheck(second, (x,))
    assert torch.autograd.gradgradcheck(second, (x,))


def test_opcheck_of_the_backward():
    x = torch.randn(2, 3, 4, requires_grad=True)
    for squared in (False, True):
        args = (x, ops.sample_norm(x).detach().requires_grad_(), torch.randn(2, requires_grad=True), squared)
        torch.library.opcheck(OPS["sample_norm_backward"].overload, args)


def test_the_thread_count_does_not_change_the_bits():
    x = torch.randn(3, 60001, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            norm = ops.sample_norm(x)
            results.append((norm, torch.autograd.grad(norm.sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("shape", [(0, 3, 4), (0,), (2, 0, 3), (2, 0)])
@pytest.mark.parametrize("squared", [False, True])
def test_empty(shape, squared):
    x = torch.randn(shape, requires_grad=True)
    for backend in ("cpu", "reference"):
        with genfast.backend(backend):
            found = ops.sample_norm(x, squared=squared)
            assert found.shape == shape[:1]
            assert not found.any()
            assert torch.autograd.grad(found.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(3, 4).long(), TypeError, r"x has dtype torch\.int64, expected a floating-point"),
        (torch.ones(()), ValueError, r"x has shape \(\), expected \(N, \.\.\.\)"),
        ([1.0, 2.0], TypeError, r"x is a list, expected a torch\.Tensor"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, r"x has dtype torch\.complex64"),
    ],
)
def test_errors(x, error, message):
    with pytest.raises(error, match=message):
        ops.sample_norm(x)
