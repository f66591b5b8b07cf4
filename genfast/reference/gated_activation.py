"""Gated activation (Gated PixelCNN, 1606.05328, equation 2; WaveNet, 1609.03499, equation 2):
y = tanh(f + V_f) sigma(g + V_g), f and g the halves of x, V the conditioning."""

from __future__ import annotations

import torch
from torch import Tensor


def _pair(t: Tensor, groups: int, axis: int) -> tuple[Tensor, Tensor]:
    """The f and the g halves: k blocks of channels, each [f | g]."""
    blocks = t.unflatten(axis, (groups, 2, -1))
    return blocks.select(axis + 1, 0).flatten(axis, axis + 1), blocks.select(axis + 1, 1).flatten(axis, axis + 1)


def _spread(bias: Tensor, x: Tensor) -> Tensor:
    """A bias (2C,), (N, 2C) or (N, 2C, ...) with the axes of x."""
    shape = (1, *bias.shape) if bias.dim() == 1 else tuple(bias.shape)
    return bias.reshape(shape + (1,) * (x.dim() - len(shape)))


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _arguments(x: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    return _pair(wide if bias is None else wide + _spread(bias.to(wide.dtype), x), groups, 1)


def gated_activation(x: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """(N, C, ...) of x (N, 2C, ...)."""
    f, g = _arguments(x, bias, groups)
    y = f.tanh() * g.sigmoid()
    return y.to(x.dtype)


def gated_activation_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(dx, dbias) with df = d sigma(g) (1 - tanh(f)^2), dg = d tanh(f) sigma(g) (1 - sigma(g)), and dbias their sums
    over what bias was spread over. dbias is empty where there is no bias, or one of x's own shape, whose gradient is
    dx."""
    f, g = _arguments(x, bias, groups)
    d, t, s = grad_y.to(f.dtype), f.tanh(), g.sigmoid()
    pair = torch.stack([p.unflatten(1, (groups, -1)) for p in (d * s * (1 - t * t), d * t * s * (1 - s))], 2)
    dx = pair.flatten(1, 3)
    if bias is None or bias.shape == x.shape:
        return dx.to(x.dtype), dx.new_empty(0)
    dbias = dx.sum([i for i in range(x.dim()) if i != 1 and not (i == 0 and bias.dim() == 2)])
    return dx.to(x.dtype), dbias.to(bias.dtype)
