"""The product of Householder reflections (arXiv:1611.09630, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def householder(vectors: Tensor) -> Tensor:
    """Q = H_K ... H_1 (D, D) of ``vectors`` (K, D), H = I - 2 v v^T / |v|^2; a vector of zeros gives I.

    Q = I - V^T S^-1 V with unit rows V and S = tril(V V^T, -1) + I / 2 (Joffrain et al. 2006, with the last factor
    first).
    """
    # By the largest entry first, so that no square under- or overflows.
    largest = vectors.detach().abs().amax(1, keepdim=True)
    tiny = torch.finfo(vectors.dtype).tiny
    v = vectors / torch.where(largest > 0, largest, 1)
    norm = v.square().sum(1, keepdim=True).clamp_min(tiny).sqrt()
    v = v / norm
    half = 0.5 * torch.eye(len(v), dtype=v.dtype, device=v.device)
    solved = torch.linalg.solve_triangular((v @ v.T).tril(-1) + half, v, upper=False)
    product: Tensor = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - v.T @ solved
    return product
