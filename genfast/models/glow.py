"""models.Glow."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import nn as gnn
from .base_flow import DiagonalGaussian, FlowModel, latent_parts
from .conditioners import ConvNet


class Glow(FlowModel):
    """Glow (arXiv:1807.03039): per level squeeze, K steps of (activation norm, 1x1 convolution, coupling), split.

    Args:
        shape: (C, H, W), H and W multiples of 2^levels.
        levels: L, how often the maps are squeezed.
        steps: K, steps per level.
        hidden: width of the conditioners.
        plu: PLU parametrisation of the 1x1 convolutions.
        scale: the couplings' scale map.
        context: size of a conditioning vector; 0 for none.
        reversible: trains in memory that does not grow with ``steps`` (genfast.nn.ReversibleSequential).
        channels_last: computes in channels_last, where CPU convolutions are faster; the numbers are the same.

    The steps work on pairs of channel halves, so that inside a level nothing is split or concatenated, and the half
    that a level factors out is one of the pair.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.Glow((3, 8, 8), levels=1, steps=2, hidden=8)
        >>> model.sample(4).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (3, 32, 32),
        *,
        levels: int = 3,
        steps: int = 8,
        hidden: int = 64,
        plu: bool = True,
        scale: Literal["exp", "sigmoid", "tanh", "softclamp", "additive"] = "sigmoid",
        context: int = 0,
        reversible: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__(tuple(shape))
        if len(self.shape) != 3 or levels < 1 or self.shape[1] % 2**levels or self.shape[2] % 2**levels:
            raise ValueError(
                f"Glow: shape={self.shape} with levels={levels}, expected (C, H, W) with H and W multiples of 2^levels"
            )
        self.config = dict(
            shape=list(self.shape),
            levels=levels,
            steps=steps,
            hidden=hidden,
            plu=plu,
            scale=scale,
            context=context,
            reversible=reversible,
            channels_last=channels_last,
        )
        self.squeeze = self.layers.Squeeze()
        self.levels = nn.ModuleList()
        self._pairs = self.layers is gnn  # the plain steps take whole tensors
        chain = self.layers.ReversibleSequential if reversible else self.layers.FlowSequential
        channels, outputs = self.shape[0], 1 if scale == "additive" else 2
        for _ in range(levels):
            channels *= 4
            half = channels // 2
            nets = [ConvNet(channels - half, outputs * half, hidden, context) for _ in range(steps)]
            self.levels.append(chain(*(self.layers.GlowStep(channels, net, plu=plu, scale=scale) for net in nets)))
            channels = half
        self.base = DiagonalGaussian(self.dim)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _ordered(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.config["channels_last"] else x

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, parts, logdets = self._ordered(self.check(x)), [], []
        for level in self.levels:
            x = self.squeeze(x)[0]
            half = x.shape[1] // 2
            y, logdet = level((x[:, :half], x[:, half:]) if self._pairs else x, context)
            x, out = y if self._pairs else (y[:, :half], y[:, half:])
            parts.append(out)
            logdets.append(logdet)
        flat = [p.flatten(1) for p in (*parts[:-1], x, parts[-1])]
        return torch.cat(flat, 1), gnn.bijection.total(logdets, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *parts, x, last = latent_parts(z, self.shape, len(self.levels))
        parts.append(last)
        logdets = []
        for level in reversed(self.levels):
            halves = x, parts.pop()
            y = tuple(map(self._ordered, halves)) if self._pairs else self._ordered(torch.cat(halves, 1))
            y, logdet = level.inverse(y, context)  # type: ignore[operator]
            x = self.squeeze.inverse(torch.cat(y, 1) if self._pairs else y)[0]
            logdets.append(logdet)
        return x, gnn.bijection.total(logdets, x)
