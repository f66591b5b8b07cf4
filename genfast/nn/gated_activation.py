"""nn.GatedActivation and nn.GatedMaskedConv2d: the layers of Gated PixelCNN and WaveNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..reference import causal
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


class GatedMaskedConv2d(causal.GatedMaskedConv2d):
    """A layer of Gated PixelCNN: a vertical and a horizontal stack without a blind spot (arXiv:1606.05328, figure 2).

    The vertical stack sees the rows above whole; its map, one row down, enters the horizontal stack, which sees the row's
    left part. Never the other way round. ``forward(v, h, context=None)`` gives (v, h, skip).

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

    def _parts(self) -> tuple[Any, Any]:
        return MaskedConv2d, GatedActivation
