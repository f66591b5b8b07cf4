"""ops.nade and ops.nade_sample: exact small cases, the derivatives that a long scan gives, and samples of the plain
loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import genfast
from genfast import ops, reference
from genfast._registry import OPS
from tests.conftest import poisoned


def weights(d, h, p=1, dtype=torch.float32, scale=1.0):
    return (
        scale * torch.randn(d, h, dtype=dtype),
        torch.randn(d, p, h, dtype=dtype) / h**0.5,
        torch.randn(d, p, dtype=dtype),
        torch.randn(h, dtype=dtype),
    )


def every(dims):
    return torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * dims)


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_probabilities_of_all_binary_vectors_sum_to_one(activation):
    x = every(6)
    logits = ops.nade(x, *weights(6, 17, dtype=torch.float64, scale=2.0), activation=activation)[..., 0]
    nll = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_logits_come_back_and_not_probabilities():
    """A public NADE put its sigmoid under a loss that has one: no pixel's loss falls below log(1 + 1/e) = 0.313 nats
    then."""
    w, v, b, c = weights(5, 8)
    b[:] = 12.0
    logits = ops.nade(torch.ones(3, 5), w, torch.zeros_like(v), b, c)
    assert bool((logits == 12).all())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 0], torch.ones(3, 5))
    assert float(loss) < 1e-5


def test_a_conditional_does_not_see_its_own_or_later_dimensions():
    args = weights(9, 20, 3)
    x = torch.randn(4, 9)
    before = ops.nade(x, *args)
    for d in range(9):
        other = x.clone()
        other[:, d] += 1
        after = ops.nade(other, *args)
        assert torch.equal(after[:, : d + 1], before[:, : d + 1])
        assert d == 8 or not torch.equal(after[:, d + 1 :], before[:, d + 1 :])


@pytest.mark.parametrize(("d", "h", "p"), [(1, 1, 1), (2, 500, 1), (33, 16, 5), (65, 31, 1), (7, 257, 12)])
@pytest.mark.parametrize("n", [1, 3, 37])
def test_sizes_that_fill_no_block(n, d, h, p):
    check(n, d, h, p, "sigmoid", torch.randn(n, d), True)
    check(n, d, h, p, "sigmoid", (torch.rand(n, d) < 0.3).float(), False)


def check(n, d, h, p, activation, x, rescaled, scale=0.3):
    args: list[Tensor | None] = [x, *weights(d, h, p, scale=scale), torch.rand(d) + 0.3 if rescaled else None]
    found_args = [a if a is None else a.clone().requires_grad_() for a in args]
    exact_args = [a if a is None else a.double().requires_grad_() for a in args]
    grad = torch.randn(n, d, p)
    found = OPS["nade"](*found_args, activation)
    exact = reference.nade(*exact_args, activation)
    close(found, exact, 2e-6)
    wanted = [a for a in found_args if a is not None]
    exact_wanted = [a for a in exact_args if a is not None]
    grads = torch.autograd.grad(found, wanted, grad)
    for g, e in zip(grads, torch.autograd.grad(exact, exact_wanted, grad.double(), materialize_grads=True)):
        close(g, e, 1e-5)


def close(found, exact, bound):
    assert found.shape == exact.shape
    error = float((found.detach().double() - exact.detach()).norm())
    assert error <= bound * float(exact.detach().norm()) + 1e-12


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_gradients_of_long_scans_keep_float32s_precision(activation):
    check(3, 700, 24, 1, activation, torch.randn(3, 700), False, scale=0.05)


def test_an_outlier_does_not_wipe_out_the_states_before_it():
    """Behind x_d = 1e4, what W_d x_d was added to cannot be had by subtracting it again."""
    x = torch.randn(5, 60)
    x[:, 50] = 1e4 * torch.randn(5).sign()
    args = weights(60, 40)
    wanted = [a.clone().requires_grad_() for a in args]
    exact = [a.double().requires_grad_() for a in args]
    grad = torch.randn(5, 60, 1)
    grad[:, 51:] = 0
    found = torch.autograd.grad(ops.nade(x, *wanted), wanted, grad)
    for f, e in zip(
        found, torch.autograd.grad(reference.nade(x.double(), *exact, None, "sigmoid"), exact, grad.double())
    ):
        close(f, e, 1e-5)


def test_binary_data_take_the_same_as_data_that_are_nearly_so():
    """Where x_d is 0 the kernels leave a step out; here none may."""
    x = (torch.rand(20, 30, dtype=torch.float64) < 0.4).double()
    args = [a.requires_grad_() for a in weights(30, 21, dtype=torch.float64)]
    grad = torch.randn(20, 30, 1, dtype=torch.float64)
    ones = torch.ones(30, dtype=torch.float64)
    short = ops.nade(x, *args)
    whole = ops.nade(x, *args, rescale=ones)
    torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(short, args, grad), torch.autograd.grad(whole, args, grad)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_neither_threads_nor_a_second_run_change_the_bits():
    x = torch.randn(70, 40)
    args = [x.requires_grad_(), *(a.requires_grad_() for a in weights(40, 150, 2)), torch.ones(40, requires_grad=True)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = OPS["nade"](*args, "sigmoid")
            results.append([out, *torch.autograd.grad(out.square().sum(), args)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_an_empty_batch_has_gradients_of_zero():
    args = [a.requires_grad_() for a in weights(37, 33)]
    x = torch.empty(0, 37, requires_grad=True)
    with poisoned():
        found = torch.autograd.grad(ops.nade(x, *args).sum(), [x, *args])
    assert all(g.shape == a.shape and not g.count_nonzero() for g, a in zip(found, [x, *args]))
    assert ops.nade_sample(torch.empty(0, 37, 1), *args).shape == (0, 37)


def test_a_batch_gives_what_its_samples_give_alone():
    x, args = torch.randn(33, 12), weights(12, 40, 2)
    whole = ops.nade(x, *args)
    alone = torch.cat([ops.nade(row[None], *args) for row in x])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


def test_third_derivatives():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    args = [a.requires_grad_() for a in weights(3, 4, 2, dtype=torch.float64)]

    def second(*inputs):
        (g,) = torch.autograd.grad(ops.nade(*inputs).sin().sum(), inputs[1], create_graph=True)
        (gg,) = torch.autograd.grad(g.cos().sum(), inputs[0], create_graph=True)
        return gg

    assert torch.autograd.gradcheck(second, (x, *args), fast_mode=True)


def test_the_backward_op_is_checked_as_an_op():
    x, w, v, _, c = torch.randn(3, 5), *weights(5, 6, 2)
    for rescale, need_x in ((torch.ones(5), True), (None, False)):
        args = (torch.randn(3, 5, 2), x, w, v, c, rescale, "tanh", need_x)
        torch.library.opcheck(OPS["nade_backward"].overload, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        OPS["nade_sample"].overload,
        (torch.rand(3, 5, 1), w, v[:, :1], torch.zeros(5, 1), c, None, None, None, "relu", "bernoulli"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_extreme_values_stay_finite_and_nan_stays_in_its_sample():
    w, v, b, c = weights(6, 18, scale=1e4)
    x = torch.randn(4, 6)
    out = ops.nade(1e3 * x, w, v, b, c)
    assert bool(out.isfinite().all())
    x[1, 2] = math.nan
    out = ops.nade(x, *weights(6, 18))
    assert bool(out[[0, 2, 3]].isfinite().all())
    assert bool(out[1, :3].isfinite().all())
    assert bool(out[1, 3:].isnan().all())


# ---- sampling ----


def loop(uniforms, args, kind, activation="sigmoid", given=None, known=None, rescale=None):
    """D passes over everything, as one writes it without a sampler."""
    x = torch.zeros(uniforms.shape[:2], dtype=uniforms.dtype)
    for d in range(uniforms.shape[1]):
        params = reference.nade(x, *args, rescale, activation)[:, d]
        x[:, d] = reference.nade_draw(params, uniforms[:, d], kind)
        if known is not None:
            x[:, d] = torch.where(known[:, d], given[:, d], x[:, d])
    return x


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize(
    ("kind", "p"), [("bernoulli", 1), ("categorical", 5), ("categorical", 2), ("gaussian_mixture", 12)]
)
def test_samples_equal_those_of_the_naive_loop(kind, p, n):
    args = weights(11, 37, p, scale=0.3)
    uniforms = torch.rand(n, 11, 2 if kind == "gaussian_mixture" else 1)
    rescale = torch.rand(11) + 0.5 if kind == "gaussian_mixture" else None
    found = ops.nade_sample(uniforms, *args, rescale=rescale, kind=kind)
    expected = loop(uniforms, args, kind, rescale=rescale)
    if kind == "gaussian_mixture":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)
    given, known = torch.where(torch.rand(n, 11) < 0.5, 1.0, 0.25), torch.rand(n, 11) < 0.4
    found = ops.nade_sample(uniforms, *args, rescale=rescale, kind=kind, given=given, known=known)
    assert torch.equal(found[known], given[known])
    torch.testing.assert_close(
        found, loop(uniforms, args, kind, given=given, known=known, rescale=rescale), rtol=1e-4, atol=1e-4
    )


def test_samples_have_the_frequencies_that_the_likelihood_says():
    args = [a.double() for a in weights(3, 5)]
    x = ops.nade_sample(torch.rand(40_000, 3, 1, dtype=torch.float64), *args)
    codes = (x @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
    found = torch.bincount(codes, minlength=8) / 40_000
    logits = ops.nade(every(3), *args)[..., 0]
    exact = (-torch.nn.functional.binary_cross_entropy_with_logits(logits, every(3), reduction="none").sum(1)).exp()
    assert float((found - exact).abs().max()) < 0.012  # 4.8 standard deviations of a frequency of one half


def test_extreme_uniforms_draw_finite_numbers_and_exact_quantiles():
    u = torch.tensor([0.0, 1e-9, 1e-3, 0.0749, 0.0751, 0.5, 0.93, 0.999, 1.0], dtype=torch.float64)
    uniforms = torch.stack((torch.full_like(u, 0.5), u), 1)[:, None]
    zero = torch.zeros(1, 3, 2, dtype=torch.float64)
    args = (zero[:, 0], zero, torch.zeros(1, 3, dtype=torch.float64), zero[0, 0])
    found = ops.nade_sample(uniforms, *args, kind="gaussian_mixture")[:, 0]
    torch.testing.assert_close(found, torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)), rtol=1e-12, atol=1e-14)
    assert bool(ops.nade_sample(uniforms.float(), *(a.float() for a in args), kind="gaussian_mixture").isfinite().all())


def test_samples_have_no_gradient():
    args = [a.requires_grad_() for a in weights(4, 5)]
    assert not ops.nade_sample(torch.rand(2, 4, 1), *args).requires_grad


# ---- errors ----


def bad(**changes):
    w, v, b, c = weights(4, 6)
    given = {"x": torch.randn(2, 4), "weight": w, "readout": v, "bias": b, "hidden_bias": c, **changes}
    return ops.nade(**given)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "nade: x has dtype torch.int64", {"x": torch.ones(2, 4, dtype=torch.int64)}),
        (TypeError, "nade: weight is a list", {"weight": [1.0]}),
        (ValueError, r"nade: x has shape \(2, 2, 2\), expected \(N, D\)", {"x": torch.ones(2, 2, 2)}),
        (ValueError, r"nade: weight has shape \(5, 6\), expected \(4, H\)", {"weight": torch.ones(5, 6)}),
        (ValueError, r"nade: readout has shape \(4, 1, 7\), expected \(4, 1, 6\)", {"readout": torch.ones(4, 1, 7)}),
        (ValueError, r"nade: bias has shape \(4,\), expected \(4, 1\)", {"bias": torch.ones(4)}),
        (
            ValueError,
            r"nade: hidden_bias has shape \(3, 6\), expected \(6,\) or \(2, 6\)",
            {"hidden_bias": torch.ones(3, 6)},
        ),
        (ValueError, r"nade: rescale has shape \(6,\), expected \(4,\)", {"rescale": torch.ones(6)}),
        (ValueError, "nade: activation='elu', expected one of 'sigmoid', 'relu', 'tanh'", {"activation": "elu"}),
    ],
)
def test_bad_arguments_are_named(error, message, changes):
    with pytest.raises(error, match=message):
        bad(**changes)
    with pytest.raises(error, match=message), genfast.backend("reference"):
        bad(**changes)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            ValueError,
            r"nade_sample: uniforms has shape \(2, 4, 2\), expected \(N, D, 1\)",
            {"uniforms": torch.rand(2, 4, 2)},
        ),
        (ValueError, "kind='poisson', expected one of 'bernoulli'", {"kind": "poisson"}),
        (ValueError, "readout has 1 parameters a dimension, expected at least 2 levels", {"kind": "categorical"}),
        (ValueError, "given is there alone", {"given": torch.zeros(2, 4)}),
        (TypeError, "known has dtype torch.float32", {"given": torch.zeros(2, 4), "known": torch.zeros(2, 4)}),
    ],
)
def test_bad_arguments_of_the_sampler_are_named(error, message, changes):
    w, v, b, c = weights(4, 6)
    given = {"uniforms": torch.rand(2, 4, 1), "weight": w, "readout": v, "bias": b, "hidden_bias": c, **changes}
    with pytest.raises(error, match=message):
        ops.nade_sample(given.pop("uniforms"), **given)
