"""The three products of a linear layer, y = x W^T + c, dx = b W and dW = b^T t, with the signs of a leaky relu as bits
of rows: bit i % 8 of byte i // 8 of a row stands for its element i, and rows are padded to whole bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import leaky_relu, pack, unpack


def row_signs(x: Tensor) -> Tensor:
    """(N, ceil(M / 8)) bits: where x (N, M) is above zero."""
    return pack(F.pad(x.detach() > 0, (0, -x.shape[1] % 8))).view(x.shape[0], (x.shape[1] + 7) // 8)


def row_mask(bits: Tensor, columns: int) -> Tensor:
    """(N, columns) booleans of (N, ceil(columns / 8)) bits."""
    return unpack(bits).view(bits.shape[0], 8 * bits.shape[1])[:, :columns]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float | None) -> tuple[Tensor, Tensor]:
    """(y, bits): y (N, M) of x (N, K) and weight (M, K); with a slope, its leaky relu and the signs (else empty)."""
    y = F.linear(x, weight, bias)
    if slope is None:
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    return leaky_relu(y, slope), row_signs(y)


def linear_input(grad: Tensor, weight: Tensor, bits: Tensor | None, slope: float) -> Tensor:
    """(N, K) of grad (N, M) and weight (M, K); times 1 where ``bits`` is set and ``slope`` elsewhere."""
    y = grad @ weight
    if bits is None:
        return y
    return torch.where(row_mask(bits, y.shape[1]), y, y * slope if slope else torch.zeros_like(y))


def linear_weight(grad: Tensor, x: Tensor) -> Tensor:
    """(M, K) of grad (N, M) and x (N, K)."""
    return grad.t() @ x
