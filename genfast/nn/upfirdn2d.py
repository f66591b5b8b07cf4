"""nn.Upfirdn2d, nn.Upsample2d and nn.Downsample2d: resampling with a filter that is kept as a buffer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops.upfirdn2d import Pair


class Upfirdn2d(nn.Module):
    """:func:`genfast.ops.upfirdn2d` with a fixed filter, a buffer named ``filter``.

    Args:
        taps: what :func:`genfast.ops.setup_filter` takes; normalised to a sum of 1.
        up, down, padding, flip_filter, gain: as :func:`genfast.ops.upfirdn2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.Upfirdn2d([1, 3, 3, 1], up=2, padding=(2, 1, 2, 1), gain=4)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 16, 16])
    """

    filter: Tensor

    def __init__(
        self,
        taps: Any,
        *,
        up: Pair = 1,
        down: Pair = 1,
        padding: Pair = 0,
        flip_filter: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("filter", ops.setup_filter(taps))
        self.up, self.down, self.padding, self.flip_filter, self.gain = up, down, padding, flip_filter, gain

    def forward(self, x: Tensor) -> Tensor:
        return ops.upfirdn2d(
            x,
            self.filter,
            up=self.up,
            down=self.down,
            padding=self.padding,
            flip_filter=self.flip_filter,
            gain=self.gain,
        )

    def extra_repr(self) -> str:
        return f"filter={tuple(self.filter.shape)}, up={self.up}, down={self.down}, padding={self.padding}"


class Upsample2d(nn.Module):
    """Upsampling by ``up`` with a low-pass filter; see :func:`genfast.ops.upsample2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.Upsample2d()(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 16, 16])
    """

    filter: Tensor

    def __init__(self, taps: Any = (1, 3, 3, 1), *, up: Pair = 2, padding: Pair = 0, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("filter", ops.setup_filter(taps))
        self.up, self.padding, self.gain = up, padding, gain

    def forward(self, x: Tensor) -> Tensor:
        return ops.upsample2d(x, self.filter, up=self.up, padding=self.padding, gain=self.gain)

    def extra_repr(self) -> str:
        return f"filter={tuple(self.filter.shape)}, up={self.up}"


class Downsample2d(nn.Module):
    """Downsampling by ``down`` after a low-pass filter; see :func:`genfast.ops.downsample2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.Downsample2d()(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 4, 4])
    """

    filter: Tensor

    def __init__(self, taps: Any = (1, 3, 3, 1), *, down: Pair = 2, padding: Pair = 0, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("filter", ops.setup_filter(taps))
        self.down, self.padding, self.gain = down, padding, gain

    def forward(self, x: Tensor) -> Tensor:
        return ops.downsample2d(x, self.filter, down=self.down, padding=self.padding, gain=self.gain)

    def extra_repr(self) -> str:
        return f"filter={tuple(self.filter.shape)}, down={self.down}"
