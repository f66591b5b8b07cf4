"""Upsample with zeros, pad, filter, downsample: the resampling of StyleGAN2 (1912.04958), scipy.signal.upfirdn in two
axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """``up`` and ``down`` are (x, y), ``padding`` is (x0, x1, y0, y1) of the upsampled image, negative where it
    crops."""
    n, c, h, w = x.shape
    wide = x if x.element_size() >= 4 else x.float()
    # Zeros after each element of both axes.
    z = F.pad(wide.reshape(n, c, h, 1, w, 1), (0, up[0] - 1, 0, 0, 0, up[1] - 1)).reshape(n, c, h * up[1], w * up[0])
    z = F.pad(z, tuple(padding))
    f = filter.to(wide.dtype)
    f = f if f.dim() == 2 else f[:, None] * f[None, :]
    f = (f if flip_filter else f.flip(0, 1)) * gain  # F.conv2d is a correlation
    y = F.conv2d(z.reshape(n * c, 1, *z.shape[2:]), f[None, None])
    return y.reshape(n, c, *y.shape[2:])[:, :, :: down[1], :: down[0]].to(x.dtype)
