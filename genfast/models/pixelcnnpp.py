"""models.PixelCNNPlusPlus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from ..nn.causal import check_context
from .base_autoregressive import AutoregressiveModel


class GatedResidual(nn.Module):
    """The residual block of PixelCNN++ (arXiv:1701.05517, section 2.5): conv, gate, and a short cut from ``aside``."""

    def __init__(self, conv: Any, channels: int, aside: int, dropout: float) -> None:
        super().__init__()
        self.elu = gnn.ConcatELU()
        self.conv_in = conv(2 * channels, channels)
        self.short_cut = nn.Conv2d(2 * aside, channels, 1) if aside else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_out = conv(2 * channels, 2 * channels)

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Tensor:
        h = self.conv_in(self.elu(x))
        if self.short_cut is not None:
            h = h + self.short_cut(self.elu(aside))
        h = self.conv_out(self.dropout(self.elu(h)))
        return x + F.glu(h, 1)


class PixelCNNPlusPlus(AutoregressiveModel):
    """PixelCNN++ (arXiv:1701.05517): two streams over three resolutions with short cuts, and a mixture of logistics.

    Args:
        in_channels: 1 or 3.
        filters: of both streams.
        blocks: residual blocks at each resolution of the way down; one more on the way up below the finest.
        mixtures: K logistics.
        levels: of a colour.
        dropout: in the blocks.
        shape: (C, H, W), what ``sample`` draws unless told otherwise; H and W are multiples of 4.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> genfast.models.PixelCNNPlusPlus(filters=8, blocks=1, mixtures=2).sample(2, (3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """

    head = "logistic_mixture"

    def __init__(
        self,
        in_channels: int = 3,
        filters: int = 80,
        blocks: int = 2,
        mixtures: int = 10,
        levels: int = 256,
        *,
        dropout: float = 0.0,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_channels, levels, shape)
        name = type(self).__name__
        if in_channels not in (1, 3):
            raise ValueError(f"{name}: in_channels={in_channels}, expected 1 or 3")
        for label, value in (("filters", filters), ("blocks", blocks), ("mixtures", mixtures)):
            if value < 1:
                raise ValueError(f"{name}: {label}={value}, expected at least 1")
        self.config = {
            "in_channels": in_channels,
            "filters": filters,
            "blocks": blocks,
            "mixtures": mixtures,
            "levels": levels,
            "dropout": dropout,
            "shape": self.shape,
        }
        f = filters
        down, right = gnn.DownShiftedConv2d, gnn.DownRightShiftedConv2d
        self.scale, self.ones = gnn.ScaleLevels(levels), gnn.AppendOnes()
        self.one_down, self.one_right = gnn.Shift(down=1), gnn.Shift(right=1)
        self.first_v = down(in_channels + 1, f, (2, 3))
        self.first_h = nn.ModuleList([down(in_channels + 1, f, (1, 3)), right(in_channels + 1, f, (2, 1))])

        def stream(conv: Any, aside: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(GatedResidual(conv, f, a, dropout) for a in aside)

        counts = [blocks, blocks + 1, blocks + 1]
        self.encode_v = nn.ModuleList(stream(down, [0] * blocks) for _ in range(3))
        self.encode_h = nn.ModuleList(stream(right, [f] * blocks) for _ in range(3))
        self.halve_v = nn.ModuleList(down(f, f, (2, 3), 2) for _ in range(2))
        self.halve_h = nn.ModuleList(right(f, f, (2, 2), 2) for _ in range(2))
        self.decode_v = nn.ModuleList(stream(down, [f] * k) for k in counts)
        self.decode_h = nn.ModuleList(stream(right, [2 * f] * k) for k in counts)
        self.double_v = nn.ModuleList(gnn.DownShiftedConvTranspose2d(f, f) for _ in range(2))
        self.double_h = nn.ModuleList(gnn.DownRightShiftedConvTranspose2d(f, f) for _ in range(2))
        self.out = nn.Conv2d(f, (10 if in_channels == 3 else 3) * mixtures, 1)

    def check(self, x: Tensor) -> Tensor:
        x = super().check(x)
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected H and W that are multiples of 4"
            )
        return x

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(type(self).__name__, context, False)
        x = self.ones(self.scale(x))
        v = self.one_down(self.first_v(x))
        h = self.one_down(self.first_h[0](x)) + self.one_right(self.first_h[1](x))
        kept = [(v, h)]
        for level in range(3):
            for block_v, block_h in zip(self.encode_v[level], self.encode_h[level]):  # type: ignore[call-overload]
                v = block_v(v)
                h = block_h(h, v)
                kept.append((v, h))
            if level < 2:
                v, h = self.halve_v[level](v), self.halve_h[level](h)
                kept.append((v, h))
        v, h = kept.pop()
        for level in range(3):
            for block_v, block_h in zip(self.decode_v[level], self.decode_h[level]):  # type: ignore[call-overload]
                side_v, side_h = kept.pop()
                v = block_v(v, side_v)
                h = block_h(h, torch.cat((v, side_h), 1))
            if level < 2:
                v, h = self.double_v[level](v), self.double_h[level](h)
        out: Tensor = self.out(F.elu(h))
        return out
