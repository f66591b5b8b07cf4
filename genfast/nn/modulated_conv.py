"""nn.ModulatedConv2d: the convolution of StyleGAN2 with the affine layer that makes its styles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class ModulatedConv2d(nn.Module):
    """A convolution modulated by a latent vector: styles = A w + b, then :func:`genfast.ops.modulated_conv2d`.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; the kernel is square and keeps the image's size.
        style_dim: of the latent vector w.
        up, down: resampling factors.
        demodulate: False for the layers that make colours (StyleGAN2's toRGB).
        resample_filter: taps for ``up`` and ``down``, of which :func:`genfast.ops.setup_filter` makes a buffer.
        equalized_lr: weights are drawn from N(0, 1) and scaled at run time by 1 / sqrt(fan in) (Progressive GAN,
            1710.10196, section 4.1), in the affine layer and, where there is no demodulation to cancel it, in the
            convolution; False draws them at that scale.

    The affine layer's bias starts at 1, so that the first styles change nothing on average.

    Raises:
        ValueError: sizes or factors below 1.

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.ModulatedConv2d(8, 4, 3, style_dim=16, up=2)
        >>> layer(torch.randn(2, 8, 8, 8), torch.randn(2, 16)).shape
        torch.Size([2, 4, 16, 16])
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        *,
        up: int = 1,
        down: int = 1,
        demodulate: bool = True,
        resample_filter: Any = (1, 3, 3, 1),
        equalized_lr: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        sizes = dict(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, style_dim=style_dim)
        for name, value in (sizes | dict(up=up, down=down)).items():
            if value < 1:
                raise ValueError(f"ModulatedConv2d: {name}={value}, expected at least 1")
        self.in_channels, self.out_channels, self.kernel_size, self.style_dim = sizes.values()
        self.up, self.down, self.demodulate, self.equalized_lr, self.eps = up, down, demodulate, equalized_lr, eps
        weight_std, affine_std = 1 / math.sqrt(in_channels * kernel_size**2), 1 / math.sqrt(style_dim)
        self.weight_gain, self.affine_gain = (weight_std, affine_std) if equalized_lr else (1.0, 1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.affine_weight = nn.Parameter(torch.randn(in_channels, style_dim))
        self.affine_bias = nn.Parameter(torch.ones(in_channels))
        if not equalized_lr:
            with torch.no_grad():
                self.weight.mul_(weight_std)
                self.affine_weight.mul_(affine_std)
        self.register_buffer("resample_filter", ops.setup_filter(resample_filter) if max(up, down) > 1 else None)

    def styles(self, w: Tensor) -> Tensor:
        """(N, in_channels) from latent vectors (N, style_dim)."""
        if w.dim() != 2 or w.shape[1] != self.style_dim:
            raise ValueError(
                f"ModulatedConv2d: w has shape {tuple(w.shape)}, expected (N, style_dim = {self.style_dim})"
            )
        styles = nn.functional.linear(w, self.affine_weight * self.affine_gain, self.affine_bias)
        # Demodulation cancels any constant on the weight, so that it is spared there.
        return styles if self.demodulate else styles * self.weight_gain

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        return ops.modulated_conv2d(
            x,
            self.weight,
            self.styles(w),
            noise=noise,
            up=self.up,
            down=self.down,
            padding=self.kernel_size // 2,
            demodulate=self.demodulate,
            resample_filter=self.resample_filter,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, style_dim={self.style_dim}, "
            f"up={self.up}, down={self.down}, demodulate={self.demodulate}"
        )
