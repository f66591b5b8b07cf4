"""Spectral normalisation (SN-GAN, 1802.05957, algorithm 1): v = n(W^T u), u = n(W v), sigma = u^T W v, W / sigma."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """(out, rest): axis ``dim`` first, the others flattened in their order."""
    return weight.movedim(dim, 0).flatten(1)


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor | None = None, iterations: int = 1, eps: float = 1e-12, dim: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W / sigma, u, v, sigma), u and v after so many power iterations and constant in the derivative.

    An iteration takes v from u and then u from v; with ``v`` given, first u from v (torch's parametrization). Without
    an iteration ``v`` must be given.
    """

    def unit(x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x)
        return x / norm.clamp_min(eps)

    w = _matrix(_wide(weight), dim)
    fixed, left = w.detach(), _wide(u.detach()).to(w.dtype)
    right = None if v is None else _wide(v.detach()).to(w.dtype)
    for _ in range(iterations):
        if right is not None and v is not None:
            left = unit(fixed @ right)
        right = unit(fixed.mT @ left)
        if v is None:
            left = unit(fixed @ right)
    assert right is not None
    sigma = left @ (w @ right)
    normed = (_wide(weight) / sigma).to(weight.dtype)
    return normed, left.to(u.dtype, copy=True), right.to(u.dtype, copy=True), sigma


def spectral_norm_backward(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor:
    """G / sigma + (g_sigma - <G, W> / sigma^2) u v^T."""
    w = _wide(weight)
    left, right = u.detach().to(w.dtype), v.detach().to(w.dtype)
    across = torch.outer(left, right).reshape(w.movedim(dim, 0).shape).movedim(0, dim)
    found = torch.zeros_like(w)
    if grad is not None:
        g = _wide(grad).to(w.dtype)
        found = g / sigma - (g * w).sum() / sigma.square() * across
    if grad_sigma is not None:
        found = found + grad_sigma * across
    return found.to(weight.dtype)
