"""models.PixelRNN: images pixel by pixel, by Row LSTM or Diagonal BiLSTM layers (1601.06759)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.pixel_rnn import CausalConv2d, DiagonalBiLSTM, RowLSTM
from ..ops import _check


class PixelRNN(nn.Module):
    """PixelRNN: a 7 x 7 convolution of mask type A, residual LSTM blocks, and two 1 x 1 convolutions to the logits.

    A block takes 2h channels to an LSTM of h, back to 2h by a 1 x 1 convolution, and adds (figure 5 of the paper).

    Args:
        in_channels: colour channels of the images, each seeing those before it.
        channels: 2h; half of it must be a multiple of in_channels.
        layers: how many LSTM blocks.
        kind: "row" for Row LSTM, "diagonal" for Diagonal BiLSTM.
        levels: values that a pixel can have: 0 to levels - 1.

    Shapes: x (N, C, H, W), whole numbers of any dtype, to logits (N, levels, C, H, W); logits[n, :, c, i, j] depend on what
        comes before colour c of pixel (i, j) in raster order, and on nothing else.

    Raises:
        ValueError: arguments or an x that do not fit.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu 2016 (arXiv:1601.06759, sections 3 and 5, table 1).

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.PixelRNN(channels=8, layers=1, kind="diagonal", levels=2)
        >>> model(torch.randint(2, (3, 1, 6, 6))).shape
        torch.Size([3, 2, 1, 6, 6])
    """

    def __init__(self, in_channels: int = 1, channels: int = 32, layers: int = 4, kind: str = "row", levels: int = 256) -> None:
        super().__init__()
        _check.choice("PixelRNN", "kind", kind, ("row", "diagonal"))
        for name, value, least in (("in_channels", in_channels, 1), ("layers", layers, 1), ("levels", levels, 2)):
            if value < least:
                raise ValueError(f"PixelRNN: {name}={value}, expected at least {least}")
        if channels < 2 or channels % (2 * in_channels):
            raise ValueError(
                f"PixelRNN: channels={channels}, expected a multiple of {2 * in_channels}, twice in_channels={in_channels}"
            )
        self.config = {
            "in_channels": in_channels, "channels": channels, "layers": layers, "kind": kind, "levels": levels,
        }  # fmt: skip
        self.in_channels, self.levels = in_channels, levels

        def conv(inputs: int, outputs: int, size: int, mask_type: str) -> CausalConv2d:
            return CausalConv2d(inputs, outputs, size, mask_type=mask_type, data_channels=in_channels)

        lstm = RowLSTM if kind == "row" else DiagonalBiLSTM
        self.first = conv(in_channels, channels, 7, "A")
        self.lstms = nn.ModuleList(lstm(channels, channels // 2, data_channels=in_channels) for _ in range(layers))
        self.ups = nn.ModuleList(conv(channels // 2, channels, 1, "B") for _ in range(layers))
        self.hidden = conv(channels, channels, 1, "B")
        self.logits = conv(channels, levels * in_channels, 1, "B")

    def forward(self, x: Tensor) -> Tensor:
        """The logits of whole-numbered images ``x`` (N, C, H, W): (N, levels, C, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"PixelRNN: x has shape {tuple(x.shape)}, expected (N, {self.in_channels}, H, W)")
        y: Tensor = self.first(2 * x.to(self.first.weight.dtype) / (self.levels - 1) - 1)
        for lstm, up in zip(self.lstms, self.ups):
            y = y + up(lstm(y))
        y = self.logits(F.relu(self.hidden(F.relu(y))))
        return y.reshape(x.shape[0], self.levels, self.in_channels, *x.shape[2:])
