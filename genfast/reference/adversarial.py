"""Adversarial losses of the logits r = D(real) and f = D(fake), each (N,) to a scalar mean, and what is added to
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- the critic's side: (real, fake) ----


def minimax_critic(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) with D = sigmoid (arXiv:1406.2661, eq. 1), from logits without overflow."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (arXiv:1802.05957, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def least_squares_critic(real: Tensor, fake: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """E (D(x) - b)^2 / 2 + E (D(G(z)) - a)^2 / 2 (arXiv:1611.04076, eq. 2 and 9)."""
    return 0.5 * (real - b).square().mean() + 0.5 * (fake - a).square().mean()


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E D(G(z)) - E D(x) (arXiv:1701.07875, algorithm 1)."""
    return fake.mean() - real.mean()


def relativistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(G(z)) - D(x)) over pairs (arXiv:1807.00734; R3GAN, arXiv:2501.05441, eq. 2)."""
    return F.softplus(fake - real).mean()


def relativistic_average_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-(D(x) - E D(G(z)))) + E softplus(D(G(z)) - E D(x)) (arXiv:1807.00734, eq. 16, standard form)."""
    return F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean()


CRITIC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimax": minimax_critic,
    "nonsaturating": minimax_critic,
    "hinge": hinge_critic,
    "lsgan": least_squares_critic,
    "wasserstein": wasserstein_critic,
    "relativistic": relativistic_critic,
    "relativistic-average": relativistic_average_critic,
}

# Sums of a function of real and one of fake: the slope by one of them needs nothing of the other.
SEPARABLE = (minimax_critic, hinge_critic, least_squares_critic, wasserstein_critic)

# ---- the generator's side: (fake, real); only the relativistic forms look at real ----


def minimax_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """E log(1 - D(G(z))), which saturates where the critic wins (arXiv:1406.2661, eq. 1)."""
    return -F.softplus(fake).mean()


def nonsaturating_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-E log D(G(z)) (arXiv:1406.2661, section 3)."""
    return F.softplus(-fake).mean()


def least_squares_generator(fake: Tensor, real: Tensor | None = None, c: float = 1.0) -> Tensor:
    """E (D(G(z)) - c)^2 / 2 (arXiv:1611.04076, eq. 2 and 9)."""
    return 0.5 * (fake - c).square().mean()


def wasserstein_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-E D(G(z)) (arXiv:1701.07875, algorithm 1); the hinge loss has the same (arXiv:1802.05957, eq. 17)."""
    return -fake.mean()


def relativistic_generator(fake: Tensor, real: Tensor) -> Tensor:
    """E softplus(D(x) - D(G(z))) over pairs (arXiv:1807.00734; R3GAN, arXiv:2501.05441, eq. 2)."""
    return F.softplus(real - fake).mean()


def relativistic_average_generator(fake: Tensor, real: Tensor) -> Tensor:
    """E softplus(-(D(G(z)) - E D(x))) + E softplus(D(x) - E D(G(z))) (arXiv:1807.00734, eq. 17, standard form)."""
    return F.softplus(real.mean() - fake).mean() + F.softplus(real - fake.mean()).mean()


GENERATOR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "minimax": minimax_generator,
    "nonsaturating": nonsaturating_generator,
    "hinge": wasserstein_generator,
    "lsgan": least_squares_generator,
    "wasserstein": wasserstein_generator,
    "relativistic": relativistic_generator,
    "relativistic-average": relativistic_average_generator,
}
RELATIVISTIC = ("relativistic", "relativistic-average")  # whose generator's loss needs D(real) too

# ---- what is added ----


def gaussian_nll(mean: Tensor, log_std: Tensor, values: Tensor) -> Tensor:
    """-E log N(values; mean, e^(2 log_std)) summed over the codes, (N, D) each, with its constant log sqrt(2 pi)."""
    normal = (values - mean) * (-log_std).exp()
    half_log_two_pi = 0.9189385332046727
    return (0.5 * normal.square() + log_std + half_log_two_pi).sum(1).mean()


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """||E f(x) - E f(G(z))||^2, summed over layers (arXiv:1606.03498, section 3.1)."""
    parts = [(r.mean(0) - f.mean(0)).square().sum() for r, f in zip(real, fake)]
    return torch.stack(parts).sum()


def historical_average(parameters: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """||theta - (1/t) sum_i theta_i||^2 (arXiv:1606.03498, section 3.3); the mean is a constant."""
    return torch.stack([(p - m).square().sum() for p, m in zip(parameters, means)]).sum()
