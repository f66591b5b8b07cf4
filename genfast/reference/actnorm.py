"""Activation normalisation (Glow, 1807.03039, section 3.1): y = s x + b per channel, logdet = S sum log|s|, S
positions."""

from __future__ import annotations

from torch import Tensor

from .affine_coupling import per_channel


def positions(x: Tensor) -> int:
    """H W ...: how many positions each channel has."""
    size = 1
    for s in x.shape[2:]:
        size *= s
    return size


def actnorm(
    x: Tensor, scale: Tensor, bias: Tensor, log_scale: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (y, logdet); ``log_scale`` says that ``scale`` holds log s."""
    dtype = x.dtype
    wide = x if x.element_size() >= 4 else x.float()
    s, b = scale.to(wide.dtype), bias.to(wide.dtype)
    log_s = s if log_scale else s.abs().log()
    s = per_channel(s.exp() if log_scale else s, x)
    y = (wide - per_channel(b, x)) / s if inverse else wide * s + per_channel(b, x)
    logdet = (-1 if inverse else 1) * positions(x) * log_s.sum()
    return y.to(dtype), logdet.expand(x.shape[0]).clone()


def actnorm_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    log_scale: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form: forward dx = s d, ds = sum d x + S g / s, db = sum d; inverse with y = (x - b) / s:
    dx = d / s, ds = -(sum d y + S g) / s, db = -sum d / s. In terms of log s, ds is multiplied by s."""
    dtype = x.dtype
    wide = x if x.element_size() >= 4 else x.float()
    d = wide.new_zeros(wide.shape) if grad_y is None else grad_y.to(wide.dtype)
    g = 0 if grad_logdet is None else grad_logdet.to(wide.dtype).sum() * positions(x)
    s = scale.to(wide.dtype).exp() if log_scale else scale.to(wide.dtype)
    axes = [i for i in range(x.dim()) if i != 1]
    if inverse:
        y = (wide - per_channel(bias.to(wide.dtype), x)) / per_channel(s, x)
        dx = d / per_channel(s, x)
        dlog_s, db = -((d * y).sum(axes) + g), -d.sum(axes) / s
    else:
        dx = d * per_channel(s, x)
        dlog_s, db = (d * wide).sum(axes) * s + g, d.sum(axes)
    ds = dlog_s if log_scale else dlog_s / s
    return dx.to(dtype), ds.to(scale.dtype), db.to(bias.dtype)
