"""models.PixelRNN: images pixel by pixel, by Row LSTM or Diagonal BiLSTM layers (1601.06759)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from ..nn.causal import check_context
from ..ops import _check
from .base_autoregressive import AutoregressiveModel


class PixelRNN(AutoregressiveModel):
    """PixelRNN: a 7 x 7 convolution of mask type A, residual LSTM blocks, and two 1 x 1 convolutions to the logits.

    A block takes 2h channels to an LSTM of h, back to 2h by a 1 x 1 convolution, and adds (figure 5 of the paper).

    Args:
        in_channels: colour channels of the images, each seeing those before it.
        channels: 2h; half of it must be a multiple of in_channels. By default 32, or what is next to it that fits.
        layers: how many LSTM blocks.
        kind: "row" for Row LSTM, "diagonal" for Diagonal BiLSTM.
        levels: of a colour.
        shape: (C, H, W), what ``sample`` draws unless told otherwise.

    The recurrences have no pixel program: ``sample`` runs the standard loop, and says so unless asked for
        ``method="naive"``.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu 2016 (arXiv:1601.06759, sections 3 and 5, table 1).

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.PixelRNN(channels=8, layers=1, kind="diagonal", levels=2)
        >>> model.log_prob(torch.randint(2, (3, 1, 6, 6))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int | None = None,
        layers: int = 4,
        kind: Literal["row", "diagonal"] = "row",
        levels: int = 256,
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_channels, levels, shape)
        _check.choice("PixelRNN", "kind", kind, ("row", "diagonal"))
        if layers < 1:
            raise ValueError(f"PixelRNN: layers={layers}, expected at least 1")
        channels = self.width(channels, 32, 2)
        self.config = {
            "in_channels": in_channels,
            "channels": channels,
            "layers": layers,
            "kind": kind,
            "levels": levels,
            "shape": self.shape,
        }

        def conv(inputs: int, outputs: int, size: int, mask_type: str, activation: str | None = None) -> nn.Module:
            options = {"mask_type": mask_type, "data_channels": in_channels, "activation": activation}
            layer: nn.Module = self.layers.MaskedConv2d(inputs, outputs, size, **options)
            return layer

        lstm = self.layers.RowLSTM if kind == "row" else self.layers.DiagonalBiLSTM
        self.scale = gnn.ScaleLevels(levels)
        self.first = conv(in_channels, channels, 7, "A")
        self.lstms = nn.ModuleList(lstm(channels, channels // 2, data_channels=in_channels) for _ in range(layers))
        self.ups = nn.ModuleList(conv(channels // 2, channels, 1, "B") for _ in range(layers))
        self.hidden = conv(channels, channels, 1, "B", "relu")
        self.out = conv(channels, levels * in_channels, 1, "B")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context("PixelRNN", context, False)
        y: Tensor = self.first(self.scale(x))
        for lstm, up in zip(self.lstms, self.ups):
            y = y + up(lstm(y))
        out: Tensor = self.out(self.hidden(F.relu(y)))
        return out
