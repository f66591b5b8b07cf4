"""nn.GatedActivation and nn.GatedMaskedConv2d: the layers of Gated PixelCNN and WaveNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from .causal import ConditionBias, DownShiftedConv2d, Shift, check_context
from .masked_conv import MaskedConv2d


class GatedActivation(nn.Module):
    """tanh(f + V_f) sigmoid(g + V_g) of (N, 2 C, ...), through :func:`genfast.ops.gated_activation`.

    Args:
        groups: contiguous blocks of channels, each [f | g]; 1 for halves.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.gated_activation(x, bias, groups=self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}" if self.groups > 1 else ""


class GatedMaskedConv2d(nn.Module):
    """A layer of Gated PixelCNN: a vertical and a horizontal stack without a blind spot (arXiv:1606.05328, figure 2).

    The vertical stack sees the rows above whole; its map, one row down, enters the horizontal stack, which sees the
    row's left part. Never the other way round. ``forward(v, h, context=None)`` gives (v, h, skip).

    Args:
        in_channels: of v and h.
        channels: C, of what comes out; both stacks work on 2 C before the gate.
        kernel_size: odd k; the vertical stack convolves k // 2 + 1 rows of k, the horizontal one k // 2 + 1 in its row.
        mask_type: "A" in the first layer, where there is no residual either; "B" after it.
        data_channels, group_order: as of :class:`MaskedConv2d`, for the horizontal stack.
        context_channels: features of the condition (N, D) or (N, D, H, W); None for none.
        residual: adds h to what the horizontal stack gives (type B).

    Raises:
        ValueError: an even kernel, or channels that are no multiple of data_channels.

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.GatedMaskedConv2d(8, 8, 3)
        >>> v, h, skip = layer(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6))
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        *,
        mask_type: str = "B",
        data_channels: int = 1,
        group_order: str = "interleaved",
        context_channels: int | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if kernel_size % 2 == 0:
            raise ValueError(f"{name}: kernel_size={kernel_size}, expected an odd number")
        if data_channels < 1 or channels % data_channels:
            raise ValueError(f"{name}: channels={channels} is not a multiple of data_channels={data_channels}")
        half = kernel_size // 2
        colours: dict[str, Any] = dict(data_channels=data_channels, group_order=group_order)
        blocks = data_channels if group_order == "blocked" else 1
        masked, gate = self._parts()
        self.residual = residual and mask_type == "B" and in_channels == channels
        self.vertical = DownShiftedConv2d(in_channels, 2 * channels, (half + 1, kernel_size))
        self.horizontal = masked(
            in_channels, 2 * channels, (1, half + 1), center=(0, half), mask_type=mask_type, **colours
        )
        self.down = Shift(down=1)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.gate_v, self.gate_h = gate(blocks), gate(blocks)
        self.out = masked(channels, channels, 1, mask_type="B", **colours)
        self.skip = masked(channels, channels, 1, mask_type="B", **colours)
        self.condition_v = self.condition_h = None
        if context_channels is not None:
            self.condition_v = ConditionBias(context_channels, 2 * channels)
            self.condition_h = ConditionBias(context_channels, 2 * channels)

    def _parts(self) -> tuple[Any, Any]:
        """The masked convolution and the gate."""
        return MaskedConv2d, GatedActivation

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        check_context(type(self).__name__, context, self.condition_v is not None)
        rows = self.vertical(v)
        left = self.horizontal(h) + self.link(self.down(rows))
        if self.condition_v is None or self.condition_h is None:
            v, gated = self.gate_v(rows), self.gate_h(left)
        else:
            v, gated = self.gate_v(rows, self.condition_v(context)), self.gate_h(left, self.condition_h(context))
        out = self.out(gated)
        return v, h + out if self.residual else out, self.skip(gated)
