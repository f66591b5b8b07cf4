"""Gram matrices, G = F F^T with F (C, positions), and the style loss (Gatys et al., arXiv:1508.06576, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _like(rows: Tensor, features: Tensor) -> Tensor:
    """``rows`` (N, C, positions) with the shape, dtype and memory order of ``features``."""
    out = rows.reshape(features.shape).to(features.dtype)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(features.dim(), torch.contiguous_format)
    last = not features.is_contiguous() and features.is_contiguous(memory_format=form)
    return out.contiguous(memory_format=form if last else torch.contiguous_format)


def gram_matrix(features: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """scale (F + shift)(F + shift)^T of features (N, C, *), (N, C, C): exactly symmetric, float32 for half types."""
    f = _wide(features).flatten(2) + shift
    g = scale * (f @ f.mT)
    return g.tril() + g.tril(-1).mT


def gram_matrix_backward(features: Tensor, grad: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """dF = scale (dG + dG^T)(F + shift)."""
    f, g = _wide(features).flatten(2) + shift, _wide(grad)
    return _like(scale * ((g + g.mT) @ f), features)


def style_loss(
    features: Tensor, target: Tensor, scale: float = 1.0, shift: float = 0.0, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """L_n = factor sum_ij (G_nij - A_nij)^2 for target A (N or 1, C, C), and D = G - (A + A^T) / 2, which is G - A for
    a Gram matrix A and of which dL/dF is 4 factor scale D (F + shift) for any A."""
    g, a = gram_matrix(features, scale, shift), _wide(target)
    return factor * (g - a).square().sum((1, 2)), g - (a + a.mT) / 2


def style_loss_layers(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    scales: Sequence[float],
    shift: float,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """style_loss of each layer: L (layers, N), and every D, one after the other, as one vector."""
    found = [style_loss(f, a, scale, shift, k) for f, a, scale, k in zip(features, targets, scales, factors)]
    return torch.stack([value for value, _ in found]), torch.cat([difference.flatten() for _, difference in found])


def style_loss_backward(
    features: Tensor, grad: Tensor, difference: Tensor, scale: float = 1.0, shift: float = 0.0, factor: float = 1.0
) -> Tensor:
    """dF_n = 4 factor scale dL_n D_n (F_n + shift)."""
    f = _wide(features).flatten(2) + shift
    return _like(4 * factor * scale * _wide(grad)[:, None, None] * (_wide(difference) @ f), features)
