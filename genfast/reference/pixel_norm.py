"""Pixel norm (progressive growing of GANs, 1710.10196, section 4.2): y = x / sqrt(mean_c x^2 + eps) at each
position."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    """y of x (N, C, ...)."""
    wide = _wide(x)
    return (wide * torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps)).to(x.dtype)


def pixel_norm_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """dx = r (d - y mean_c(d y)) with r = (mean_c x^2 + eps)^(-1/2)."""
    wide = _wide(x)
    d, r = grad_y.to(wide.dtype), torch.rsqrt((wide * wide).mean(1, keepdim=True) + eps)
    y = wide * r
    return (r * (d - y * (d * y).mean(1, keepdim=True))).to(x.dtype)
