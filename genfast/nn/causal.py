"""Layers of causal networks without an op of ours: shifted convolutions, shifts, levels and conditions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DownShiftedConv2d(nn.Conv2d):
    """A convolution whose output row i sees the rows up to i, whole: padding above, and equally left and right.

    The vertical stack of Gated PixelCNN (arXiv:1606.05328, section 2.2) and PixelCNN++ (arXiv:1701.05517). Causal only
    behind a :class:`Shift` by one row. All taps are live, so it is the library's convolution. (N, C, H, W) to
    (N, O, H / stride, W / stride).

    Raises:
        ValueError: an even kernel width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = (2, 3),
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)
        if self.kernel_size[1] % 2 == 0:
            raise ValueError(f"DownShiftedConv2d: kernel_size={kernel_size}, expected an odd width")

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.kernel_size
        return super().forward(F.pad(x, (w // 2, w // 2, h - 1, 0)))


class DownRightShiftedConv2d(nn.Conv2d):
    """A convolution whose output sees what is above and to the left, itself included: padding above and left.

    The horizontal stack of PixelCNN++ (arXiv:1701.05517). All taps are live. (N, C, H, W) to (N, O, H / stride, W /
    stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = (2, 2),
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.kernel_size
        return super().forward(F.pad(x, (w - 1, 0, h - 1, 0)))


class DownShiftedConvTranspose2d(nn.ConvTranspose2d):
    """Doubles the size in the vertical stack (PixelCNN++): row i sees rows up to i // 2 of the coarse map, whole."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = (2, 3),
        stride: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, output_padding=(0, 1), bias=bias)
        if self.kernel_size[1] % 2 == 0:
            raise ValueError(f"DownShiftedConvTranspose2d: kernel_size={kernel_size}, expected an odd width")

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        y = super().forward(x)
        edge, step = (self.kernel_size[1] - 1) // 2, self.stride[0]
        return y[:, :, : step * x.shape[2], edge : step * x.shape[3] + edge]


class DownRightShiftedConvTranspose2d(nn.ConvTranspose2d):
    """Doubles the size in the horizontal stack (PixelCNN++): (i, j) sees the coarse map up to (i // 2, j // 2)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = (2, 2),
        stride: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        y = super().forward(x)
        return y[:, :, : self.stride[0] * x.shape[2], : self.stride[1] * x.shape[3]]


class Shift(nn.Module):
    """Moves an image (N, C, H, W) down and to the right; what comes in is zero. A sequence (N, C, L) moves by
    ``down``."""

    def __init__(self, down: int = 0, right: int = 0) -> None:
        super().__init__()
        if down < 0 or right < 0:
            raise ValueError(f"Shift: down={down}, right={right}, expected at least 0: the other way is the future")
        self.down, self.right = down, right

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return F.pad(x, (self.down, 0))[..., : x.shape[2]]
        return F.pad(x, (self.right, 0, self.down, 0))[:, :, : x.shape[2], : x.shape[3]]

    def extra_repr(self) -> str:
        return f"down={self.down}, right={self.right}"


class ScaleLevels(nn.Module):
    """Integer levels 0 ... levels - 1 to floating point in [-1, 1]: 2 x / (levels - 1) - 1.

    The result has the type of the network, as ``double()``, ``half()`` and ``to`` set it; floats keep their own.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"ScaleLevels: levels={levels}, expected at least 2")
        self.levels = levels
        self.register_buffer("like", torch.zeros(()), persistent=False)  # follows the type of the network's parameters

    like: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x * (2 / (self.levels - 1)) - 1
        dtype = self.like.dtype
        wide = x.to(
            dtype if dtype.itemsize >= 4 else torch.float32
        )  # a half-precision number has no room for large levels
        return (wide * (2 / (self.levels - 1)) - 1).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.levels}"


class LevelEmbedding(nn.Module):
    """A learned vector per level: (N, 1, *spatial) whole numbers to (N, features, *spatial), as a one-hot
    convolution."""

    def __init__(self, levels: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, features))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != 1:
            raise ValueError(f"LevelEmbedding: x has shape {tuple(x.shape)}, expected (N, 1, *spatial)")
        return F.embedding(x[:, 0].long(), self.weight).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class AppendOnes(nn.Module):
    """One more channel that is 1 everywhere, so that padded convolutions see where the image ends (PixelCNN++)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1), value=1.0)


class ConcatELU(nn.Module):
    """elu of (x, -x) along the channels (PixelCNN++)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(torch.cat((x, -x), 1))


class ConditionBias(nn.Module):
    """A condition as a bias: (N, D) to (N, O), or with a map (N, D, *spatial) to (N, O, *spatial), by one linear map.

    Class conditioning takes a one-hot or embedded class, spatial conditioning a map of the image's size (Gated
    PixelCNN, arXiv:1606.05328, section 2.3; WaveNet, arXiv:1609.03499, section 2.5).

    Raises:
        ValueError: a condition of another number of features.
    """

    def __init__(self, context_channels: int, out_channels: int) -> None:
        super().__init__()
        self.context_channels, self.out_channels = context_channels, out_channels
        self.linear = nn.Linear(context_channels, out_channels, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        if context.dim() < 2 or context.shape[1] != self.context_channels:
            raise ValueError(
                f"ConditionBias: context has shape {tuple(context.shape)}, expected (N, {self.context_channels}) or "
                f"(N, {self.context_channels}, *spatial)"
            )
        bias: Tensor = self.linear(context.movedim(1, -1))
        return bias.movedim(-1, 1)


def check_context(name: str, context: Tensor | None, conditional: bool) -> None:
    """A condition is given exactly where there are layers for one; one that nothing reads would be lost in silence."""
    if conditional and context is None:
        raise ValueError(f"{name}: context is None, expected a condition, as context_channels was given")
    if not conditional and context is not None:
        raise ValueError(f"{name}: context is given, expected None without context_channels")
