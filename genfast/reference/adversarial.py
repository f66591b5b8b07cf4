"""Adversarial losses of the logits r = D(real) and f = D(fake), each (N,) to a scalar mean."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def minimax_critic(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) with D = sigmoid (arXiv:1406.2661, eq. 1), from logits without overflow."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (arXiv:1802.05957, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def least_squares_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E (D(x) - 1)^2 / 2 + E D(G(z))^2 / 2 (arXiv:1611.04076, eq. 9)."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E D(G(z)) - E D(x) (arXiv:1701.07875, algorithm 1)."""
    return fake.mean() - real.mean()


def relativistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(G(z)) - D(x)) over pairs (arXiv:1807.00734; R3GAN, arXiv:2501.05441, eq. 2)."""
    return F.softplus(fake - real).mean()


CRITIC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimax": minimax_critic,
    "hinge": hinge_critic,
    "lsgan": least_squares_critic,
    "wasserstein": wasserstein_critic,
    "relativistic": relativistic_critic,
}
