"""Modulated convolution with demodulation (StyleGAN2, 1912.04958, section 2.2, equations 1 to 3), and its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .upfirdn2d import upfirdn2d


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None,
    up: int,
    down: int,
    padding: Sequence[int],
    demodulate: bool,
    resample_filter: Tensor | None,
    flip_weight: bool,
    eps: float,
) -> Tensor:
    """One weight for each sample, as the paper has it; ``padding`` is (x0, x1, y0, y1) of the upsampled image."""
    n = x.shape[0]
    w = weight[None] * styles[:, None, :, None, None]  # (N, O, I, kh, kw), equation 1
    if demodulate:
        w = w * (w.square().sum((2, 3, 4), keepdim=True) + eps).rsqrt()  # equation 3
    f = x.new_ones((1, 1)) if resample_filter is None else resample_filter
    fw, fh = f.shape[-1], f.shape[0]
    x0, x1, y0, y1 = padding
    if up > 1:
        x0, x1, y0, y1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2, y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1, y0, y1 = (
            x0 + (fw - down + 1) // 2,
            x1 + (fw - down) // 2,
            y0 + (fh - down + 1) // 2,
            y1 + (fh - down) // 2,
        )
    one = f.new_ones((1, 1))
    z = upfirdn2d(x, f if up > 1 else one, (up, up), (1, 1), (x0, x1, y0, y1), False, up * up)
    w = w if flip_weight else w.flip(3, 4)  # F.conv2d is a correlation
    y = torch.cat([F.conv2d(z[i : i + 1], w[i]) for i in range(n)]) if n else F.conv2d(z, w.new_zeros(w.shape[1:]))
    if down > 1:
        y = upfirdn2d(y, f, (1, 1), (down, down), (0, 0, 0, 0), False, 1.0)
    return y if noise is None else y + noise


def channel_scale(x: Tensor, scale: Tensor, noise: Tensor | None = None) -> Tensor:
    """scale[n, c] x[n, c, ...] (+ noise[n, 0, ...])."""
    wide = x if x.element_size() >= 4 else x.float()
    y = wide * scale.to(wide.dtype).reshape(*scale.shape, *[1] * (x.dim() - 2))
    return (y if noise is None else y + noise.to(wide.dtype)).to(x.dtype)


def channel_scale_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dnoise); dnoise is empty where there is no noise."""
    wide = x if x.element_size() >= 4 else x.float()
    d = grad_y.to(wide.dtype)
    dx = d * scale.to(wide.dtype).reshape(*scale.shape, *[1] * (x.dim() - 2))
    dscale = (d * wide).flatten(2).sum(2) if x.dim() > 2 else d * wide
    if noise is None:
        dnoise = x.new_empty(0)
    else:
        dnoise = d.sum(1, keepdim=True)
        dnoise = (dnoise.sum(0, keepdim=True) if noise.shape[0] == 1 else dnoise).to(noise.dtype)
    return dx.to(x.dtype), dscale.to(scale.dtype), dnoise


def tap_energy(weight: Tensor) -> Tensor:
    """sum over the taps of w^2, (O, I) of (O, I, ...); float32 for half types."""
    wide = weight if weight.element_size() >= 4 else weight.float()
    return wide.square().flatten(2).sum(2)
