"""models.PixelCNN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import nn as gnn
from ..nn.causal import check_context
from .base_autoregressive import AutoregressiveModel


class PixelCNN(AutoregressiveModel):
    """PixelCNN (arXiv:1601.06759, section 3.5): a stack of masked convolutions with residuals.

    The first layer has type A, the others type B and a ReLU; 1 x 1 maps to the logits. With three colours each is seen
    by the later ones (interleaved channels).

    Args:
        in_channels: colours.
        channels: of the hidden maps; a multiple of in_channels. By default 64, or what is next to it that is one.
        layers: masked ``kernel_size`` x ``kernel_size`` convolutions, the first included.
        kernel_size: of the masked convolutions, odd.
        levels: of a colour.
        shape: (C, H, W), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> genfast.models.PixelCNN(channels=8, layers=2, levels=4).sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int | None = None,
        layers: int = 8,
        kernel_size: int = 7,
        levels: int = 256,
        *,
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
            "shape": self.shape,
        }
        if layers < 1:
            raise ValueError(f"{type(self).__name__}: layers={layers}, expected at least 1")
        if kernel_size % 2 == 0:
            raise ValueError(f"{type(self).__name__}: kernel_size={kernel_size}, expected an odd number")
        conv = self.layers.MaskedConv2d
        self.scale = gnn.ScaleLevels(levels)
        self.first = conv(
            in_channels, channels, kernel_size, mask_type="A", data_channels=in_channels, activation="relu"
        )
        self.body = nn.ModuleList(
            conv(channels, channels, kernel_size, mask_type="B", data_channels=in_channels, activation="relu")
            for _ in range(layers - 1)
        )
        self.out = conv(channels, levels * in_channels, 1, mask_type="B", data_channels=in_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(type(self).__name__, context, False)
        h = self.first(self.scale(x))
        for layer in self.body:
            h = h + layer(h)
        out: Tensor = self.out(h)
        return out
