"""models.GatedPixelCNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from .base_autoregressive import AutoregressiveModel


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN (arXiv:1606.05328), conditional on ``context`` (N, D) or (N, D, H, W) if ``context_channels`` is
    D.

    Args:
        in_channels: colours.
        channels: of the stacks; a multiple of in_channels. By default 64, or what is next to it that is one.
        layers: gated layers, the first (type A, 7 x 7) included.
        kernel_size: of the others, odd.
        levels: of a colour.
        context_channels: features of the condition, or None.
        shape: (C, H, W), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> genfast.models.GatedPixelCNN(channels=8, layers=2, levels=4).sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int | None = None,
        layers: int = 8,
        kernel_size: int = 5,
        levels: int = 256,
        *,
        context_channels: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_channels, levels, shape)
        channels = self.width(channels, 64)
        self.config = {
            "in_channels": in_channels,
            "channels": channels,
            "layers": layers,
            "kernel_size": kernel_size,
            "levels": levels,
            "context_channels": context_channels,
            "shape": self.shape,
        }
        if layers < 1:
            raise ValueError(f"{type(self).__name__}: layers={layers}, expected at least 1")
        layer = self.layers.GatedMaskedConv2d
        colours: dict[str, Any] = dict(data_channels=in_channels)
        self.scale = gnn.ScaleLevels(levels)
        self.first = layer(in_channels, channels, 7, mask_type="A", context_channels=context_channels, **colours)
        self.body = nn.ModuleList(
            layer(channels, channels, kernel_size, context_channels=context_channels, **colours)
            for _ in range(layers - 1)
        )
        conv = self.layers.MaskedConv2d
        self.hidden = conv(channels, channels, 1, mask_type="B", activation="relu", **colours)
        self.out = conv(channels, levels * in_channels, 1, mask_type="B", **colours)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.scale(x)
        v, h, skips = self.first(x, x, context)
        for layer in self.body:
            v, h, skip = layer(v, h, context)
            skips = skips + skip
        out: Tensor = self.out(self.hidden(F.relu(skips)))
        return out
