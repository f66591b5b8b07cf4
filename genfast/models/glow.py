"""models.Glow."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import nn, ops
from ..reference import models as plain


class Glow(plain.Glow):
    __doc__ = (
        (plain.Glow.__doc__ or "")
        + """
    The steps work on pairs of channel halves, so that inside a level nothing is split or concatenated, and the half that
    a level factors out is one of the pair.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.Glow((3, 8, 8), levels=1, steps=2, hidden=8)
        >>> model.sample(4).shape
        torch.Size([4, 3, 8, 8])
    """
    )

    layers = nn

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, parts, logdets = self._ordered(self.check(x)), [], []
        for level in self.levels:
            x = ops.squeeze(x)
            half = x.shape[1] // 2
            (x, out), logdet = level((x[:, :half], x[:, half:]), context)
            parts.append(out)
            logdets.append(logdet)
        flat = [p.flatten(1) for p in (*parts[:-1], x, parts[-1])]
        return torch.cat(flat, 1), nn.bijection.total(logdets, x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *parts, x = self._parts(z)
        half = x.shape[1] // 2
        parts.append(x[:, half:])
        x = x[:, :half]
        logdets = []
        for level in reversed(self.levels):
            pair = (self._ordered(x), self._ordered(parts.pop()))
            pair, logdet = level.inverse(pair, context)  # type: ignore[operator]
            x = ops.unsqueeze(torch.cat(pair, 1))
            logdets.append(logdet)
        return x, nn.bijection.total(logdets, x)
