"""nn.RowLSTM and nn.DiagonalBiLSTM: the two recurrent layers of PixelRNN."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import _check
from .masked_conv import MaskedConv2d


def _check_arguments(layer: str, in_channels: int, hidden: int, taps: int, mask_type: str, data_channels: int) -> None:
    _check.choice(layer, "mask_type", mask_type, ("A", "B"))
    for name, value in (("in_channels", in_channels), ("hidden", hidden), ("data_channels", data_channels)):
        if value < 1:
            raise ValueError(f"{layer}: {name}={value}, expected at least 1")
    if taps < 1 or taps % 2 == 0:
        raise ValueError(f"{layer}: kernel_size={taps}, expected an odd number")
    for name, value in (("in_channels", in_channels), ("hidden", hidden)):
        # The gates are cut in four at multiples of hidden, so only then are their groups those of the hidden channels.
        if value % data_channels:
            raise ValueError(f"{layer}: {name}={value} is not a multiple of data_channels={data_channels}")
    if mask_type == "A" and taps == 1 and data_channels == 1:
        raise ValueError(f"{layer}: mask_type='A' with one tap and data_channels=1 sees no input; use mask_type='B'")


def _check_input(layer: str, x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{layer}: x has shape {tuple(x.shape)}, expected (N, {channels}, H, W)")


def _uniform(*shape: int) -> nn.Parameter:
    """As torch.nn draws a convolution's weight."""
    bound = 1 / math.sqrt(shape[-2] * shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class RowLSTM(nn.Module):
    """Row LSTM: a masked 1 x k convolution of the input, and a convolutional LSTM from row to row (1601.06759, section
    3.1).

    Position (r, c) depends on the triangle above it, on the k // 2 inputs to its left and, under mask type B, on its
    own.

    Args:
        in_channels: of the input.
        hidden: h, of the output.
        kernel_size: k of both convolutions, odd.
        mask_type: "A" for a first layer, "B" for all others.
        data_channels: colour channels; channel i of input and output belongs to group i modulo data_channels, and sees
            its own position in lower groups (A), or also in its own (B).

    Shapes: x (N, in_channels, H, W) to (N, hidden, H, W).

    Raises:
        ValueError: channels that are no multiple of data_channels, an even kernel_size, an unknown mask_type, or an x
            that does not fit.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.RowLSTM(6, 9, data_channels=3)(torch.randn(2, 6, 5, 5)).shape
        torch.Size([2, 9, 5, 5])
    """

    convolution: Callable[..., nn.Module] = MaskedConv2d  # the plain twin has a plain one

    def __init__(
        self, in_channels: int, hidden: int, kernel_size: int = 3, *, mask_type: str = "B", data_channels: int = 1
    ) -> None:
        super().__init__()
        _check_arguments("RowLSTM", in_channels, hidden, kernel_size, mask_type, data_channels)
        self.in_channels, self.hidden, self.kernel_size = in_channels, hidden, kernel_size
        self.mask_type, self.data_channels = mask_type, data_channels
        self.input_to_state = self.convolution(
            in_channels, 4 * hidden, (1, kernel_size), mask_type=mask_type, data_channels=data_channels
        )
        self.state_to_state = _uniform(4 * hidden, hidden, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        _check_input("RowLSTM", x, self.in_channels)
        return self._scan(self.input_to_state(x), self.state_to_state)

    def _scan(self, gates: Tensor, weight: Tensor) -> Tensor:
        return ops.row_lstm(gates, weight)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden}, kernel_size={self.kernel_size}, mask_type={self.mask_type!r}"


class DiagonalBiLSTM(nn.Module):
    """Diagonal BiLSTM: two LSTMs along the diagonals, from the left and from the right (1601.06759, section 3.2).

    Each direction has its own 1 x 1 masked convolution of the input (the first and the last 4h channels of one) and its
    own state-to-state weight. The map from the right is shifted down by one row before the two are added, so that
    position (r, c) depends on all earlier positions, on no later one and, under mask type B, on its own input.

    Args:
        in_channels: of the input.
        hidden: h, of the output.
        mask_type: "A" or "B"; "A" needs data_channels of 2 or more, as it hides all input otherwise.
        data_channels: colour channels; channel i of input and output belongs to group i modulo data_channels, and sees
            its own position in lower groups (A), or also in its own (B).

    Shapes: x (N, in_channels, H, W) to (N, hidden, H, W).

    Raises:
        ValueError: channels that are no multiple of data_channels, an unknown or useless mask_type, or an x that does
            not fit.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.DiagonalBiLSTM(6, 9, data_channels=3)(torch.randn(2, 6, 5, 5)).shape
        torch.Size([2, 9, 5, 5])
    """

    convolution: Callable[..., nn.Module] = MaskedConv2d

    def __init__(self, in_channels: int, hidden: int, *, mask_type: str = "B", data_channels: int = 1) -> None:
        super().__init__()
        _check_arguments("DiagonalBiLSTM", in_channels, hidden, 1, mask_type, data_channels)
        self.in_channels, self.hidden = in_channels, hidden
        self.mask_type, self.data_channels = mask_type, data_channels
        self.input_to_state = self.convolution(
            in_channels, 8 * hidden, 1, mask_type=mask_type, data_channels=data_channels
        )
        self.state_to_state = _uniform(2, 4 * hidden, hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        _check_input("DiagonalBiLSTM", x, self.in_channels)
        from_left, from_right = self.input_to_state(x).chunk(2, 1)
        left = self._scan(from_left, self.state_to_state[0])
        right = self._scan(from_right.flip(3), self.state_to_state[1]).flip(3)
        return left + F.pad(right, (0, 0, 1, -1))

    def _scan(self, gates: Tensor, weight: Tensor) -> Tensor:
        return ops.diagonal_lstm(gates, weight)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden}, mask_type={self.mask_type!r}"
