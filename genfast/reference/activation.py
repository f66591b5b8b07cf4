"""Pointwise activations and what a gradient penalty needs of them (see gradient_penalty.py): the signs of a leaky relu
as bits, and for a smooth map s the chain grad s'(x) and its derivative cotangent s'(x) + grad tangent s''(x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LAST = {4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def pack(on: Tensor) -> Tensor:
    """Booleans as bytes: bit i % 8 of byte i // 8 stands for element i; the last byte is filled up with zeros."""
    flat = on.reshape(-1).to(torch.uint8)
    flat = torch.cat((flat, flat.new_zeros(-flat.numel() % 8))).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=on.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor) -> Tensor:
    """The booleans of all bits, in order."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.reshape(-1, 1) >> places) & 1).bool().view(-1)


def _walks_channels(x: Tensor) -> bool:
    if x.dim() not in _LAST or x.is_contiguous():
        return False
    return x.stride(1) == 1 and (x.shape[1] > 1 or x.is_contiguous(memory_format=_FORMATS[x.dim()]))


def memory_order(x: Tensor) -> Tensor:
    """x as it lies: channels last where it is laid out so, else its axes in order."""
    return x.permute(_LAST[x.dim()]) if _walks_channels(x) else x


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x above zero, slope x below; relu for slope 0."""
    return torch.where(x > 0, x, slope * x) if slope else torch.relu(x)


def leaky_relu_bits(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """(y, bits): bit i stands for element i in x's memory order."""
    return leaky_relu(x, slope), pack(memory_order(x.detach()) > 0)


def apply_bits(x: Tensor, bits: Tensor, slope: float) -> Tensor:
    """x where its bit is set, slope x elsewhere; bits (ceil(numel / 8),) in x's memory order, or of the rows of x (N,
    C)."""
    if bits.dim() == 2:
        on = unpack(bits).view(bits.shape[0], 8 * bits.shape[1])[:, : x.shape[1]]
    else:
        ordered = memory_order(x)
        on = unpack(bits)[: x.numel()].view(ordered.shape)
        if ordered is not x:
            on = on.permute(0, -1, *range(1, x.dim() - 1))
    return torch.where(on, x, slope * x if slope else torch.zeros_like(x))


def _gate(q: Tensor, x: Tensor, q1: Tensor | float, q2: Tensor | float) -> tuple[Tensor, Tensor]:
    """s = x sigmoid(q(x)), q1 = q' and q2 = q''."""
    p, rest = torch.sigmoid(q), torch.sigmoid(-q)  # 1 - p would cancel
    slope = p * rest
    return p + x * slope * q1, slope * (2 * q1 + x * (q2 + q1 * q1 * (rest - p)))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density, (2 - x * x) * density


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    k, c = 2 * math.sqrt(2 / math.pi), 0.044715  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return _gate(k * (x + c * x**3), x, k * (1 + 3 * c * x * x), 6 * k * c * x)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    first = 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)  # 1 - tanh^2
    return first, -2 * torch.tanh(x) * first


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    p, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return p * rest, p * rest * (rest - p)


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    p, linear = torch.sigmoid(x), x > 20
    return torch.where(linear, torch.ones_like(x), p), torch.where(linear, torch.zeros_like(x), p * torch.sigmoid(-x))


def _elu(x: Tensor, scale: float = 1.0, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    e, above = scale * alpha * torch.exp(x.clamp_max(0)), x > 0  # clamped: no infinity in the branch not taken
    return torch.where(above, scale * torch.ones_like(x), e), torch.where(above, torch.zeros_like(x), e)


def _mish(x: Tensor) -> tuple[Tensor, Tensor]:
    soft, p = torch.nn.functional.softplus(x), torch.sigmoid(x)
    w, slope = torch.tanh(soft), 4 * torch.sigmoid(2 * soft) * torch.sigmoid(-2 * soft) * p  # w' = (1 - w^2) p
    return w + x * slope, slope * (2 + x * (torch.sigmoid(-x) - 2 * w * p))


SLOPES = {
    "silu": lambda x: _gate(x, x, 1.0, 0.0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "elu": _elu,
    "selu": lambda x: _elu(x, 1.0507009873554805, 1.6732632423543772),
    "mish": _mish,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()


def activation_chain(x: Tensor, grad: Tensor, kind: str) -> Tensor:
    """grad s'(x)."""
    wide = _wide(x)
    return (grad.to(wide.dtype) * SLOPES[kind](wide)[0]).to(x.dtype)


def activation_second(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor | None, kind: str) -> Tensor:
    """cotangent s'(x) + grad tangent s''(x); without the first term where there is no cotangent."""
    wide = _wide(x)
    first, second = SLOPES[kind](wide)
    y = grad.to(wide.dtype) * tangent.to(wide.dtype) * second
    return (y if cotangent is None else y + cotangent.to(wide.dtype) * first).to(x.dtype)
