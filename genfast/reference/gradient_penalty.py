"""Gradient penalties by double backward, as their papers write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = ("wgan-gp", "wgan-lp", "r1", "r2", "r1r2", "dragan", "ar1")


def penalty_points(
    real: Tensor,
    fake: Tensor | None,
    kind: str,
    generator: torch.Generator | None = None,
    epsilon: Tensor | None = None,
    sigma: float = 0.01,
) -> Tensor:
    """Where a penalty takes the critic's gradient, (N, ...).

    wgan-gp, wgan-lp: eps real + (1 - eps) fake with one eps ~ U[0, 1] a sample (arXiv:1704.00028, algorithm 1);
    dragan: real + a std(real) U / 2 with U ~ U[0, 1] for each element, one a ~ U[0, 1] a sample and the deviation of
        the
    whole batch (arXiv:1705.07215, as its authors' code has it); r1: real; r2: fake; ar1, which takes no gradient: what
    real is compared with, real + sigma N(0, 1) (arXiv:2501.08316).
    """
    if kind == "r1":
        return real
    if kind == "r2":
        assert fake is not None
        return fake
    shape = (real.shape[0],) + (1,) * (real.dim() - 1)
    # drawn where the generator lives
    where: dict[str, Any] = {
        "dtype": real.dtype,
        "device": real.device if generator is None else generator.device,
        "generator": generator,
    }
    if kind == "ar1":
        return real + sigma * torch.randn(real.shape, **where).to(real.device)
    if kind == "dragan":
        noise = torch.rand(real.shape, **where).to(real.device)
        a = torch.rand(real.shape[0], **where).to(real.device).view(shape)
        return real + 0.5 * real.std() * a * noise
    assert fake is not None
    if epsilon is None:
        epsilon = torch.rand(real.shape[0], **where).to(real.device)
    epsilon = epsilon.view(shape)
    return epsilon * real + (1 - epsilon) * fake


def penalty_of_norms(norms: Tensor, kind: str, weight: float, target: float) -> Tensor:
    """The penalty from the norm of each sample's gradient, (N,) to ().

    wgan-gp, dragan: weight mean (n - target)^2 (arXiv:1704.00028, section 4; arXiv:1705.07215, section 2.4);
    wgan-lp: weight mean max(0, n - target)^2 (arXiv:1709.08894, section 5);
    r1, r2, r1r2: weight / 2 mean n^2 (arXiv:1801.04406, section 4.1).
    """
    if kind in ("r1", "r2", "r1r2"):
        return weight / 2 * norms.square().mean()
    excess = norms - target
    return weight * (excess.clamp(min=0) if kind == "wgan-lp" else excess).square().mean()


def gradient_penalty(
    critic: Callable[..., Tensor],
    at: Tensor,
    kind: str,
    weight: float,
    target: float,
    context: Sequence[Tensor] = (),
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(penalty, norms (N,)) of the critic's gradient at the points ``at`` (N, ...), differentiable by autograd to any
    order.

    The norm is over all but the batch axis; its gradient where a sample's gradient is zero is zero. ``penalty``, a
    function of the gradient (N, ...) to a scalar, takes the place of the ``kind``.
    """
    if not at.requires_grad:
        at = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(at, *context).sum(), at, create_graph=True)
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    if penalty is not None:
        return weight * penalty(gradient), norms
    if kind in ("r1", "r2", "r1r2"):  # without the root, which has no second derivative at zero
        return weight / 2 * gradient.square().flatten(1).sum(1).mean(), norms
    return penalty_of_norms(norms, kind, weight, target), norms
