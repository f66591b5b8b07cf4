"""The variational losses against torch.distributions and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from genfast import losses, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_likelihoods_are_those_of_torch_distributions(dtype):
    logits, x = torch.randn(3, 2, 4, 5, dtype=dtype), torch.rand(3, 2, 4, 5, dtype=dtype)
    found = losses.log_likelihood(x.round(), logits, "bernoulli")
    torch.testing.assert_close(found, Bernoulli(logits=logits).log_prob(x.round()).sum((1, 2, 3)))
    found = losses.log_likelihood(x, logits, "gaussian", variance=0.3)
    torch.testing.assert_close(found, Normal(logits, math.sqrt(0.3)).log_prob(x).sum((1, 2, 3)))
    both = torch.randn(3, 4, 4, 5, dtype=dtype)
    mean, log_variance = both.chunk(2, 1)
    expected = Normal(mean, (0.5 * log_variance).exp()).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(losses.log_likelihood(x, both, "gaussian"), expected)


@pytest.mark.parametrize(("likelihood", "channels"), [("categorical", 5), ("discretized_logistic", 6)])
def test_discrete_likelihoods_sum_to_one_over_the_levels(likelihood, channels):
    parameters = torch.randn(1, channels, 1, 1, dtype=torch.float64)
    all_levels = torch.arange(5).reshape(5, 1, 1, 1)
    found = losses.log_likelihood(all_levels, parameters.expand(5, -1, -1, -1), likelihood, levels=5)
    torch.testing.assert_close(found.logsumexp(0), torch.zeros((), dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_elbo_is_the_sum_of_its_parts_and_the_loss_that_of_a_beta_vae():
    reconstruction, kl = torch.randn(6), torch.rand(6)
    bound = losses.elbo(reconstruction, kl, beta=4.0)
    torch.testing.assert_close(bound.elbo, (reconstruction - kl).mean())
    torch.testing.assert_close(bound.elbo, bound.reconstruction - bound.kl)
    torch.testing.assert_close(bound.loss, (4 * kl - reconstruction).mean())
    torch.testing.assert_close(losses.elbo(reconstruction, kl.mean()).loss, -bound.elbo)


def linear_gaussian(x, noise):
    """z ~ N(0, 1), x | z ~ N(z, 1): p(x) = N(0, 2), and the posterior is N(x / 2, 1 / 2)."""
    mean, log_variance = x / 2, torch.full_like(x, math.log(0.5))
    return mean, log_variance, ops.diagonal_gaussian(mean, log_variance, noise)


def test_with_the_exact_posterior_both_bounds_are_the_evidence():
    torch.manual_seed(0)
    x = torch.randn(4, 1, dtype=torch.float64)
    evidence = Normal(0.0, math.sqrt(2)).log_prob(x).mean()
    values, weights = [], []
    for _ in range(2000):
        noise = torch.randn_like(x)
        _, log_variance, (z, kl) = linear_gaussian(x, noise)
        likelihood = losses.log_likelihood(x, z, "gaussian")
        values.append(losses.elbo(likelihood, kl).elbo)
        weights.append(likelihood + 0.5 * (noise.square() + log_variance - z.square()).sum(1))
    weights = torch.stack(weights)
    torch.testing.assert_close(weights, Normal(0.0, math.sqrt(2)).log_prob(x).squeeze(1).expand_as(weights))
    torch.testing.assert_close(losses.importance_weighted_bound(weights[:5]), evidence)
    assert abs(float(torch.stack(values).mean() - evidence)) < 0.05


def test_the_importance_weighted_bound_grows_with_samples():
    torch.manual_seed(0)
    weights = 2 * torch.randn(4096, 50)
    bounds = [float(losses.importance_weighted_bound(weights[:k])) for k in (1, 8, 4096)]
    assert bounds == sorted(bounds)
    assert bounds[2] == pytest.approx(2.0, abs=0.15)  # log E e^(2 n) = 2


def test_bits_and_sparsity():
    assert losses.bits_per_dim(-math.log(2) * 12, 6) == pytest.approx(2.0)
    assert losses.bits_per_dim(torch.tensor([-math.log(2)]), 1).tolist() == pytest.approx([1.0])
    activations = torch.rand(7, 3, dtype=torch.float64)
    mean = activations.mean(0)
    expected = kl_divergence(Bernoulli(torch.full_like(mean, 0.1)), Bernoulli(mean)).sum()
    torch.testing.assert_close(losses.kl_to_bernoulli(activations, 0.1), expected)
    for dead in (torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)):
        loss = losses.kl_to_bernoulli(dead, 0.1)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, dead)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: losses.log_likelihood(x, x, "poisson"),
            ValueError,
            "likelihood='poisson', expected one of 'bernoulli'",
        ),
        (lambda x: losses.log_likelihood(x, x.long(), "gaussian"), TypeError, "parameters have dtype torch.int64"),
        (lambda x: losses.log_likelihood(x.long(), x, "bernoulli"), TypeError, "x has dtype torch.int64"),
        (
            lambda x: losses.log_likelihood(x, x[:1], "bernoulli"),
            ValueError,
            r"parameters have shape \(1, 3\) and x \(2, 3\)",
        ),
        (lambda x: losses.log_likelihood(x, x, "gaussian", variance=0.0), ValueError, "variance=0.0"),
        (lambda x: losses.elbo(x, x), ValueError, r"log_likelihood has shape \(2, 3\)"),
        (lambda x: losses.elbo(x[0], x[0], beta=-1.0), ValueError, "beta=-1.0"),
        (lambda x: losses.importance_weighted_bound(x[0]), ValueError, r"log_weights has shape \(3,\)"),
        (lambda x: losses.bits_per_dim(1.0, 0), ValueError, "dim=0"),
        (lambda x: losses.kl_to_bernoulli(x, 1.0), ValueError, "rho=1.0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
