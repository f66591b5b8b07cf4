"""Bias and activation (StyleGAN2, 1912.04958; NVlabs' bias_act): y = clamp(gain f(x + b), -c, c), b a bias of each
channel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine_coupling import per_channel

# What alpha and gain are where none is given; the gains of relu, lrelu and swish keep the second moment of a normal
# input.
ACTIVATIONS: dict[str, tuple[float, float]] = {
    "linear": (0.0, 1.0),
    "relu": (0.0, math.sqrt(2)),
    "lrelu": (0.2, math.sqrt(2)),
    "tanh": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "elu": (0.0, 1.0),
    "selu": (0.0, 1.0),
    "softplus": (0.0, 1.0),
    "swish": (0.0, math.sqrt(2)),
}
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _argument(x: Tensor, bias: Tensor | None) -> Tensor:
    """v = x + b."""
    wide = _wide(x)
    return wide if bias is None else wide + per_channel(bias.to(wide.dtype), x)


def _activation(v: Tensor, act: str, alpha: float) -> Tensor:
    """f(v)."""
    if act == "relu":
        return v.relu()
    if act == "lrelu":
        return torch.where(v > 0, v, alpha * v)
    if act == "tanh":
        return v.tanh()
    if act == "sigmoid":
        return v.sigmoid()
    if act == "elu":
        return F.elu(v)
    if act == "selu":
        return F.selu(v)
    if act == "softplus":
        return F.softplus(v, threshold=40)  # at PyTorch's own 20, what is left out is 2e-9
    if act == "swish":
        return v * v.sigmoid()
    return v


def _slope(v: Tensor, act: str, alpha: float) -> Tensor:
    """f'(v); at the corner of relu, lrelu and selu that of the left side, as PyTorch has it."""
    one = torch.ones_like(v)
    if act == "relu":
        return (v > 0).to(v.dtype)
    if act == "lrelu":
        return torch.where(v > 0, one, alpha * one)
    if act == "tanh":
        return 1 - v.tanh() ** 2
    if act == "sigmoid":
        return v.sigmoid() * (-v).sigmoid()
    if act == "elu":
        return torch.where(v > 0, one, v.clamp(max=0).exp())
    if act == "selu":
        return SELU_SCALE * torch.where(v > 0, one, SELU_ALPHA * v.clamp(max=0).exp())
    if act == "softplus":
        return v.sigmoid()
    if act == "swish":
        return v.sigmoid() * (1 + v * (-v).sigmoid())
    return one


def _curvature(v: Tensor, act: str) -> Tensor:
    """f''(v); zero where f is linear."""
    zero = torch.zeros_like(v)
    if act == "tanh":
        return -2 * v.tanh() * (1 - v.tanh() ** 2)
    if act == "sigmoid":
        return v.sigmoid() * (-v).sigmoid() * (1 - 2 * v.sigmoid())
    if act == "elu":
        return torch.where(v > 0, zero, v.clamp(max=0).exp())
    if act == "selu":
        return SELU_SCALE * SELU_ALPHA * torch.where(v > 0, zero, v.clamp(max=0).exp())
    if act == "softplus":
        return v.sigmoid() * (-v).sigmoid()
    if act == "swish":
        return v.sigmoid() * (-v).sigmoid() * (2 + v * (1 - 2 * v.sigmoid()))
    return zero


def _inside(v: Tensor, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor | float:
    """1 where the clamp lets y through, 0 where it does not."""
    if clamp is None:
        return 1.0
    y = gain * _activation(v.detach(), act, alpha)
    return (y.abs() <= clamp).to(v.dtype)


def _summed(dx: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx and its sum over all but the channels, which is the gradient of the bias; that is empty where there is
    none."""
    if bias is None:
        return dx.to(x.dtype), dx.new_empty(0)
    return dx.to(x.dtype), dx.sum([i for i in range(x.dim()) if i != 1]).to(bias.dtype)


def bias_act(x: Tensor, bias: Tensor | None, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    """y of x (N, C, ...) and bias (C,)."""
    y = gain * _activation(_argument(x, bias), act, alpha)
    return (y if clamp is None else y.clamp(-clamp, clamp)).to(x.dtype)


def bias_act_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, act: str, alpha: float, gain: float, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """(dx, dbias): dx = gain f'(x + b) grad_y where the clamp lets y through, dbias its sum."""
    v = _argument(x, bias)
    dx = grad_y.to(v.dtype) * (gain * _slope(v, act, alpha)) * _inside(v, act, alpha, gain, clamp)
    return _summed(dx, x, bias)


def bias_act_second(
    grad_dx: Tensor,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """What <grad_dx, dx> gives x and the bias: gain f''(x + b) grad_y grad_dx where the clamp lets y through, and its
    sum."""
    v = _argument(x, bias)
    product = grad_dx.to(v.dtype) * grad_y.to(v.dtype)
    return _summed(product * (gain * _curvature(v, act)) * _inside(v, act, alpha, gain, clamp), x, bias)
