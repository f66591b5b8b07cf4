"""diagonal_gaussian: torch.distributions, layouts, free bits, the prior's neighbourhood, extremes, threads, errors."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import genfast
from genfast import ops
from tests.conftest import poisoned
from tests.triton.flow_cases import FORMS, strided


def library(mean, log_variance, prior_mean=None, prior_log_variance=None):
    """Each element's KL, by torch.distributions."""
    prior_mean = torch.zeros_like(mean) if prior_mean is None else prior_mean.expand(mean.shape)
    prior_log_variance = torch.zeros_like(mean) if prior_log_variance is None else prior_log_variance.expand(mean.shape)
    return kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(prior_mean, (0.5 * prior_log_variance).exp()))


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 3, 33, 70]),
    rest=st.sampled_from([(1,), (2,), (7,), (32,), (1100,), (3, 5), (4, 8, 8), (2, 3, 4, 5)]),
    last=st.booleans(),
    prior=st.sampled_from([(), ("mean",), ("mean", "log_variance")]),
    noise=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_torch_distributions(n, rest, last, prior, noise, dtype):
    form = {3: torch.channels_last, 4: torch.channels_last_3d}.get(len(rest)) if last else None
    shaped = (lambda t: t) if form is None else (lambda t: t.contiguous(memory_format=form))
    mean, log_variance = (shaped(torch.randn(n, *rest, dtype=dtype)).requires_grad_() for _ in range(2))
    priors = {f"prior_{k}": torch.randn(rest, dtype=dtype, requires_grad=True) for k in prior}
    e = torch.randn(n, *rest, dtype=dtype, requires_grad=True)
    weights, z_weights = torch.randn(n, dtype=dtype), torch.randn(n, *rest, dtype=dtype)
    leaves = [mean, log_variance, *priors.values(), *([e] if noise else [])]
    exact = {t: t.detach().double().requires_grad_() for t in leaves}
    expected = (
        library(*(exact[t] for t in (mean, log_variance)), *(exact[t] for t in priors.values())).flatten(1).sum(1)
    )
    total = (expected * weights).sum()
    with poisoned():
        if noise:
            z, kl = ops.diagonal_gaussian(mean, log_variance, e, **priors)
            sample = exact[mean] + (0.5 * exact[log_variance]).exp() * exact[e]
            total = total + (sample * z_weights).sum()
            found = torch.autograd.grad((kl * weights).sum() + (z * z_weights).sum(), leaves)
            torch.testing.assert_close(z.double(), sample, rtol=1e-6, atol=1e-6)
        else:
            kl = ops.diagonal_gaussian_kl(mean, log_variance, **priors)
            found = torch.autograd.grad((kl * weights).sum(), leaves)
    tight = 2e-6 if dtype is torch.float32 else 1e-13
    torch.testing.assert_close(kl.double(), expected, rtol=tight, atol=tight)
    for f, g in zip(found, torch.autograd.grad(total, [exact[t] for t in leaves])):
        assert (f.double() - g).norm() <= 5 * tight * g.norm()
    if form is not None:
        assert found[0].is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMS)
def test_any_layout(form):
    mean, log_variance, e = (strided(torch.randn(3, 4, 5, 7), form).detach().requires_grad_() for _ in range(3))
    mean2 = mean.detach().contiguous().requires_grad_()
    z, kl = ops.diagonal_gaussian(mean, log_variance, e, free_bits=0.1, reduction="sum")
    z2, kl2 = ops.diagonal_gaussian(mean2, log_variance.contiguous(), e.contiguous(), free_bits=0.1, reduction="sum")
    torch.testing.assert_close((z, kl), (z2, kl2))
    weights = torch.randn(3, 4, 5, 7)
    grads = [torch.autograd.grad((a * weights).sum() + b, m)[0] for a, b, m in ((z, kl, mean), (z2, kl2, mean2))]
    torch.testing.assert_close(*grads)


def test_the_halves_of_an_encoders_output_are_read_in_place():
    both = torch.randn(6, 20)
    mean, log_variance = both.chunk(2, 1)
    torch.testing.assert_close(ops.diagonal_gaussian_kl(mean, log_variance), library(mean, log_variance).sum(1))
    first, rows, [(second, stride)] = import_module("genfast.ops.diagonal_gaussian")._in_order(mean, (log_variance,))
    assert (first.data_ptr(), rows.stride) == (mean.data_ptr(), 20)
    assert (second.data_ptr(), stride) == (log_variance.data_ptr(), 20)


def test_near_the_prior_it_neither_cancels_nor_becomes_negative():
    """Where the usual formula in float32 is off by its own size."""
    mean, log_variance = torch.zeros(4096, 1), torch.linspace(-1e-3, 1e-3, 4096)[:, None]
    v = log_variance.double().squeeze(1)
    exact = 0.25 * v.square() * (1 + v / 3 + v.square() / 12 + v**3 / 60)
    usual = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
    found = ops.diagonal_gaussian_kl(mean, log_variance)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-20)
    assert ((usual - exact).abs() > 0.5 * exact).any()


def test_the_gradient_near_the_prior_does_not_cancel():
    log_variance = torch.tensor([[1e-6], [-1e-6], [1e-3], [-0.3], [0.4]], requires_grad=True)
    ops.diagonal_gaussian_kl(torch.zeros(5, 1), log_variance).sum().backward()
    torch.testing.assert_close(
        log_variance.grad.double(), 0.5 * torch.expm1(log_variance.detach().double()), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("groups", ["dimension", "channel", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_free_bits_are_a_floor_under_the_mean_over_the_batch(groups, reduction):
    torch.manual_seed(1)
    mean, log_variance = (
        (0.7 * torch.randn(5, 4, 3, 2, dtype=torch.float64)).requires_grad_(),
        torch.randn(5, 4, 3, 2).double(),
    )
    log_variance.requires_grad_()
    floor = {"dimension": 0.5, "channel": 3.5, "all": 13.0}[groups]
    each = library(mean, log_variance).mean(0)
    each = each if groups == "dimension" else each.sum((1, 2)) if groups == "channel" else each.sum()
    if groups != "all":
        assert 0 < int((each < floor).sum()) < each.numel()
    expected = each.clamp(min=floor).sum() * (5 if reduction == "sum" else 1)
    found = ops.diagonal_gaussian_kl(mean, log_variance, free_bits=floor, groups=groups, reduction=reduction)
    torch.testing.assert_close(found, expected)
    for f, e in zip(*(torch.autograd.grad(o, (mean, log_variance)) for o in (found, expected))):
        torch.testing.assert_close(f, e)


def test_below_the_floor_the_gradient_is_zero():
    mean, log_variance = torch.full((3, 2), 0.1, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    z, kl = ops.diagonal_gaussian(mean, log_variance, torch.ones(3, 2), free_bits=0.25, reduction="mean")
    assert kl.item() == 0.5
    kl_grads = torch.autograd.grad(kl, (mean, log_variance), retain_graph=True)
    assert not any(g.count_nonzero() for g in kl_grads)
    (by_mean,) = torch.autograd.grad(z.sum() + kl, mean)  # the sample still has its own
    assert torch.equal(by_mean, torch.ones(3, 2))


def test_extreme_variances_are_finite_or_infinite_as_they_should_be():
    log_variance = torch.tensor([[-1e4], [-200.0], [-80.0], [88.0], [88.7], [1e4], [float("-inf")]], requires_grad=True)
    z, kl = ops.diagonal_gaussian(torch.zeros(7, 1), log_variance, torch.ones(7, 1))
    exact = library(torch.zeros(3, 1).double(), log_variance[2:5].detach().double()).sum(1)
    torch.testing.assert_close(kl[:2].double(), 0.5 * (torch.tensor([1e4, 200.0]).double() - 1))
    torch.testing.assert_close(kl[2:5].double(), exact, rtol=1e-5, atol=0)
    assert kl[5:].tolist() == [math.inf, math.inf]
    assert not z.isnan().any()
    (by_kl,) = torch.autograd.grad(kl.sum(), log_variance, retain_graph=True)
    assert by_kl[:3].squeeze(1).tolist() == [-0.5, -0.5, -0.5]
    assert not by_kl.isnan().any()
    (by_z,) = torch.autograd.grad(z[:5].sum(), log_variance)
    assert by_z[:5].isfinite().all()  # an infinite KL that nothing asked for does not enter
    nan = torch.full((1, 1), float("nan"))
    assert ops.diagonal_gaussian_kl(nan, torch.zeros(1, 1)).isnan().all()
    assert ops.diagonal_gaussian_kl(nan, torch.zeros(1, 1), free_bits=1.0, reduction="mean").isnan()


def test_third_derivatives():
    mean, log_variance, e = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def both(m, v):
        z, kl = ops.diagonal_gaussian(m, v, e.detach())
        return (z.square().sum() * kl.sum()).sin()

    def second(m, v):
        (first,) = torch.autograd.grad(both(m, v), v, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (m, v), create_graph=True)

    assert torch.autograd.gradgradcheck(both, (mean, log_variance))
    assert torch.autograd.gradcheck(second, (mean, log_variance))


def test_half_types_sum_in_float32():
    mean, log_variance = torch.randn(4, 999).bfloat16(), torch.randn(4, 999).bfloat16()
    z, kl = ops.diagonal_gaussian(mean, log_variance)
    assert (z.dtype, kl.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(kl.double(), library(mean.double(), log_variance.double()).sum(1), rtol=1e-5, atol=0)


def test_threads_and_runs_do_not_change_the_bits():
    mean, log_variance, e = (torch.randn(97, 1500, requires_grad=True) for _ in range(3))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z, kl = ops.diagonal_gaussian(mean, log_variance, e)
            floor = ops.diagonal_gaussian_kl(mean, log_variance, free_bits=0.6, reduction="mean")
            grads = torch.autograd.grad(z.square().sum() + kl.square().sum() + floor, (mean, log_variance, e))
            results.append([z, kl, floor, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_the_noise_is_standard_and_repeats():
    zero = torch.zeros(20_000, 2)
    first, second = (ops.diagonal_gaussian(zero, zero, generator=torch.Generator().manual_seed(3)).z for _ in range(2))
    assert torch.equal(first, second)
    assert abs(float(first.mean())) < 0.02
    assert abs(float(first.std()) - 1) < 0.02
    shifted = ops.diagonal_gaussian(zero + 5, zero + math.log(4)).z
    assert abs(float(shifted.mean()) - 5) < 0.05
    assert abs(float(shifted.std()) - 2) < 0.04


def test_vectors_and_empty_batches():
    z, kl = ops.diagonal_gaussian(torch.ones(4), torch.zeros(4))
    assert z.shape == kl.shape == (4,)
    assert torch.equal(kl, torch.full((4,), 0.5))
    z, kl = ops.diagonal_gaussian(torch.ones(0, 3), torch.zeros(0, 3), free_bits=0.5, reduction="mean")
    assert z.shape == (0, 3)
    assert float(kl) == 1.5  # the floors alone
    assert ops.diagonal_gaussian_kl(torch.ones(2, 0), torch.zeros(2, 0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: ops.diagonal_gaussian(x.long(), x), TypeError, "mean has dtype torch.int64"),
        (lambda x: ops.diagonal_gaussian_kl(x, x.long()), TypeError, "log_variance has dtype torch.int64"),
        (
            lambda x: ops.diagonal_gaussian_kl(x, x[:, :2]),
            ValueError,
            r"log_variance has shape \(2, 2\), expected \(2, 3\)",
        ),
        (lambda x: ops.diagonal_gaussian(x, x, x[:1]), ValueError, r"noise has shape \(1, 3\), expected \(2, 3\)"),
        (
            lambda x: ops.diagonal_gaussian_kl(x, x, prior_mean=x[:, :2]),
            ValueError,
            "prior_mean has shape .* broadcasts",
        ),
        (
            lambda x: ops.diagonal_gaussian_kl(x, x, reduction="max"),
            ValueError,
            "reduction='max', expected one of 'none'",
        ),
        (
            lambda x: ops.diagonal_gaussian_kl(x, x, groups="pixel"),
            ValueError,
            "groups='pixel', expected one of 'dimension'",
        ),
        (lambda x: ops.diagonal_gaussian_kl(x, x, free_bits=-1.0), ValueError, "free_bits=-1.0, expected at least 0"),
        (lambda x: ops.diagonal_gaussian_kl(x, x, free_bits=1.0), ValueError, "free_bits=1.0 with reduction='none'"),
        (lambda x: ops.diagonal_gaussian(x, x, x, generator=torch.Generator()), ValueError, "both noise and generator"),
        (lambda x: ops.diagonal_gaussian_kl(x.sum(), x.sum()), ValueError, r"expected \(N, ...\)"),
        (lambda x: ops.diagonal_gaussian_kl(x, 3.0), TypeError, "log_variance is 3.0, expected"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("prior", [False, True])
def test_opcheck_of_the_backward(prior):
    given = [torch.randn(3, 4, 2, 2) for _ in range(5)]
    given[3:] = given[3:] if prior else [None, None]
    wanted = [True, True, False, prior, prior]
    grads = torch.randn(3), torch.randn(4, 2, 2), torch.randn(3, 4, 2, 2)
    op = torch.ops.genfast.diagonal_gaussian_backward.default
    torch.library.opcheck(op, (*given, *grads, wanted), test_utils=("test_schema", "test_faketensor"))
    last = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in given]
    torch.library.opcheck(op, (*last, None, grads[1], None, wanted), test_utils=("test_schema", "test_faketensor"))


def test_the_usual_step_compiles_whole():
    def loss(both):
        z, kl = genfast.ops.diagonal_gaussian(*both.chunk(2, 1), torch.ones(4, 3), free_bits=0.1, reduction="mean")
        return z.square().sum() + kl

    both = torch.randn(4, 6, requires_grad=True)
    expected = torch.autograd.grad(loss(both), both)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(both), both)
    torch.testing.assert_close(found, expected)
