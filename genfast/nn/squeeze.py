"""nn.Squeeze and nn.Split: the moves of a multi-scale flow. Neither changes the volume."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from .bijection import Bijection


class Squeeze(Bijection):
    """Blocks of positions to channels; see :func:`genfast.ops.squeeze`.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.Squeeze()(torch.randn(2, 3, 8, 8))[0].shape
        torch.Size([2, 12, 4, 4])
    """

    def __init__(
        self, factor: int = 2, *, order: Literal["pixel_unshuffle", "space_to_depth"] = "pixel_unshuffle"
    ) -> None:
        super().__init__()
        self.factor = factor
        self.order = order

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.squeeze(x, self.factor, order=self.order), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.unsqueeze(z, self.factor, order=self.order), z.new_zeros(z.shape[0])

    def extra_repr(self) -> str:
        return f"{self.factor}, order={self.order!r}"


class Split(Bijection):
    """Factors out the second half of the channels: forward(x) -> ((kept, out), 0), C - C // 2 channels kept.

    Source: RealNVP (arXiv:1605.08803, section 3.6).

    Example:
        >>> import torch, genfast
        >>> (kept, out), logdet = genfast.nn.Split()(torch.randn(2, 12, 4, 4))
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], Tensor]:
        if x.dim() < 2 or x.shape[1] < 2:
            raise ValueError(f"Split: x has shape {tuple(x.shape)}, expected (N, C, ...) with C >= 2")
        kept = x.shape[1] - x.shape[1] // 2
        return (x[:, :kept], x[:, kept:]), x.new_zeros(x.shape[0])

    def inverse(self, z: tuple[Tensor, Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.cat(z, dim=1), z[0].new_zeros(z[0].shape[0])
