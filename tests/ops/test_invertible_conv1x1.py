"""ops.invertible_conv1x1 and ops.actnorm_conv1x1: exact log-determinants, inverses, PLU factors, sizes of Glow,
errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops


def factors(c, dtype=torch.float64):
    return ops.PLU(
        torch.randperm(c),
        torch.randn(c, c, dtype=dtype),
        torch.randn(c, c, dtype=dtype),
        torch.randn(c).sign().to(dtype),
        0.1 * torch.randn(c, dtype=dtype),
    )


SHAPES = st.sampled_from([(1, 1), (130, 5), (2, 3, 7), (3, 12, 4, 4), (2, 17, 5, 3), (1, 48, 9, 9), (2, 4, 2, 3, 5)])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, plu=st.booleans(), last=st.booleans())
def test_conv1x1_inverse_undoes_forward(shape, plu, last):
    x = torch.randn(shape, dtype=torch.float64)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim()) if last else None
    x = x if form is None else x.contiguous(memory_format=form)
    c = shape[1]
    weight = factors(c) if plu else torch.linalg.qr(torch.randn(c, c, dtype=torch.float64))[0]
    if plu:
        weight = weight._replace(lower=0.1 * weight.lower, upper=0.1 * weight.upper)
    z, logdet = ops.invertible_conv1x1(x, weight)
    back, minus = ops.invertible_conv1x1(z, weight, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(minus, -logdet)
    matrix = genfast.reference.plu_matrix(*weight) if plu else weight
    torch.testing.assert_close(z, torch.einsum("oi,ni...->no...", matrix, x))
    positions = x[0, 0].numel()
    torch.testing.assert_close(logdet, (positions * torch.linalg.slogdet(matrix)[1]).expand(shape[0]))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("plu", [False, True])
@pytest.mark.parametrize("log_scale", [False, True])
def test_the_fused_step_is_its_parts(last, plu, log_scale):
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    scale, bias = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    weight = factors(6) if plu else torch.randn(6, 6, dtype=torch.float64)
    y, a = ops.actnorm(x, scale, bias, log_scale=log_scale)
    y, b = ops.invertible_conv1x1(y, weight)
    for pair in (x, (x[:, :2], x[:, 2:])):
        (first, second), logdet = ops.actnorm_conv1x1(pair, scale, bias, weight, log_scale=log_scale, split=4)
        torch.testing.assert_close(torch.cat((first, second), 1), y)
        torch.testing.assert_close(logdet, a + b)
        back, minus = ops.actnorm_conv1x1((first, second), scale, bias, weight, log_scale=log_scale, inverse=True)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize("c", [1, 12, 24, 48, 96, 130])
@pytest.mark.parametrize("last", [False, True])
def test_conv1x1_at_glow_sizes_in_float32(c, last):
    x = torch.randn(16, c, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = torch.randn(c, c) / c**0.5
    leaves, exact = ([t.to(d).requires_grad_() for t in (x, weight)] for d in (torch.float32, torch.float64))
    y, _ = ops.invertible_conv1x1(*leaves)
    expected = F.conv2d(exact[0], exact[1][:, :, None, None])
    g = torch.randn(16, c, 8, 8)
    grads, exact_grads = torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, exact, g.double())
    for found, wanted, allowed in zip((y, *grads), (expected, *exact_grads), (2e-6, 1e-5, 1e-5)):
        found, wanted = found.detach().double(), wanted.detach()
        assert float((found - wanted).norm()) <= allowed * float(wanted.norm())


def test_factors_that_lie_transposed_give_the_same():
    """Dense but not row by row: an output made in their image would be written crosswise."""
    plain = factors(5)
    crossed = plain._replace(lower=plain.lower.t().contiguous().t(), upper=plain.upper.t().contiguous().t())
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    results = []
    for weight in (plain, crossed):
        leaves = [weight.lower.detach().requires_grad_(), weight.upper.detach().requires_grad_()]
        z, logdet = ops.invertible_conv1x1(x, weight._replace(lower=leaves[0], upper=leaves[1]))
        results.append([z, logdet, *torch.autograd.grad(z.square().sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_singular_weight():
    x, singular = torch.randn(2, 3, 4, 4), torch.ones(3, 3)
    _, logdet = ops.invertible_conv1x1(x, singular)
    assert bool((logdet == -torch.inf).all())
    with pytest.raises(ValueError, match="weight is singular"):
        ops.invertible_conv1x1(x, singular, inverse=True)
    with pytest.raises(ValueError, match="weight is singular"):
        ops.actnorm_conv1x1(x, torch.ones(3), torch.zeros(3), singular, inverse=True)


X = torch.zeros(2, 4, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"weight has shape \(3, 3\), expected \(4, 4\)", lambda: ops.invertible_conv1x1(X, torch.eye(3))),
        (ValueError, r"weight has shape \(4, 3\), expected \(C, C\)", lambda: ops.invertible_conv1x1(X, torch.ones(4,
        3))),
        (TypeError, "weight has dtype torch.int64", lambda: ops.invertible_conv1x1(X, torch.eye(4).long())),
        (TypeError, "x has dtype torch.int64", lambda: ops.invertible_conv1x1(X.long(), torch.eye(4))),
        (TypeError, "perm has dtype torch.int32",
         lambda: ops.invertible_conv1x1(X, factors(4, torch.float32)._replace(perm=torch.arange(4).int()))),
        (ValueError, r"lower has shape \(3, 4\)",
         lambda: ops.invertible_conv1x1(X, factors(4, torch.float32)._replace(lower=torch.ones(3, 4)))),
        (TypeError, "need one dtype",
         lambda: ops.invertible_conv1x1(X, factors(4, torch.float32)._replace(lower=torch.eye(4).double()))),
        (ValueError, "split=5, expected 1 to 4",
         lambda: ops.actnorm_conv1x1(X, torch.ones(4), torch.ones(4), torch.eye(4), split=5)),
        (ValueError, "same batch and positions",
         lambda: ops.actnorm_conv1x1((X, X[:1]), torch.ones(8), torch.ones(8), torch.eye(8))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
