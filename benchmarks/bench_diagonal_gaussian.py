"""The sample and the KL divergence of a variational autoencoder's posterior, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients

Both = tuple[Tensor, Tensor]


def eager(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Both:
    """What everybody writes."""
    z = mean + torch.exp(0.5 * log_variance) * noise
    return z, -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).flatten(1).sum(1)


def trick(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Both:
    """One exponential, sums by dot products and no temporary that a fused library call can spare."""
    sigma = torch.exp(0.5 * log_variance)
    both = torch.stack([mean, sigma]).flatten(2)
    squares = torch.linalg.vector_norm(both, dim=2).square().sum(0)
    return torch.addcmul(mean, sigma, noise), 0.5 * (squares - log_variance.flatten(1).sum(1) - log_variance[0].numel())


def fused(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Both:
    return genfast.ops.diagonal_gaussian(mean, log_variance, noise)


def _case(shape: tuple[int, ...], quick: bool) -> Case:
    def work(function: Callable[[Tensor, Tensor, Tensor], Both]) -> Work:
        torch.manual_seed(0)
        mean, log_variance = (torch.randn(shape, device=_ceilings.DEVICE, requires_grad=True) for _ in range(2))
        noise, by_z = (torch.randn(shape, device=_ceilings.DEVICE) for _ in range(2))
        by_kl = torch.randn(shape[0], device=_ceilings.DEVICE)
        return lambda: gradients(function(mean, log_variance, noise), (mean, log_variance), (by_z, by_kl))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(fused),
    }
    # float32: the forward reads mean, log-variance and noise and writes z; the backward reads those and grad z, and
    # writes two.
    return Case(f"diagonal_gaussian {shape}", providers, bytes=40 * math.prod(shape), quick=quick)


# The latents of a perceptron, of a hierarchical model's coarse and of its fine maps.
CASES = [_case((128, 64), True), _case((64, 16, 32, 32), True), _case((64, 32, 64, 64), False)]
