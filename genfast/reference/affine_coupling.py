"""Affine coupling: NICE (1410.8516, sec. 3.2), RealNVP (1605.08803, eq. 6-9), Glow (1807.03039, table 1).

(r, t) = params;  y_a = s(r) x_a + t, or with the shift first s(r) (x_a + t);  y_b = x_b;  logdet = sum log s(r)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = ("exp", "sigmoid", "tanh", "softclamp", "additive")
LAYOUTS = ("scale_shift", "shift_scale", "scale_shift_interleaved", "shift_scale_interleaved")
LOG_CLAMP = math.log(1000.0)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """A (C,) vector, shaped to broadcast over (N, C, ...)."""
    return v.reshape(1, -1, *([1] * (like.dim() - 2)))


def split_params(params: Tensor, scale: str, layout: str) -> tuple[Tensor | None, Tensor]:
    """The conditioner's output as (r, t); r is None for the additive coupling."""
    if scale == "additive":
        return None, params
    if layout == "scale_shift":
        r, t = params.chunk(2, dim=1)
    elif layout == "shift_scale":
        t, r = params.chunk(2, dim=1)
    elif layout == "scale_shift_interleaved":
        r, t = params[:, 0::2], params[:, 1::2]
    else:
        t, r = params[:, 0::2], params[:, 1::2]
    return r, t


def join_params(r: Tensor | None, t: Tensor, layout: str) -> Tensor:
    """The inverse of :func:`split_params`."""
    if r is None:
        return t
    first, second = (r, t) if layout.startswith("scale") else (t, r)
    if layout.endswith("interleaved"):
        return torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((first, second), dim=1)


def log_scale(r: Tensor, scale: str, alpha: Tensor | None) -> Tensor:
    """log s(r) of DESIGN section 8."""
    if scale == "exp":
        return r
    if scale == "sigmoid":
        return F.logsigmoid(r + 2)
    if scale == "tanh":
        tanh = torch.tanh(r)
        return tanh if alpha is None else per_channel(alpha, r) * tanh
    return r / (1 + r.abs() / LOG_CLAMP)


def log_scale_derivative(r: Tensor, scale: str, alpha: Tensor | None) -> Tensor:
    """d log s / d r."""
    if scale == "exp":
        return torch.ones_like(r)
    if scale == "sigmoid":
        return torch.sigmoid(-(r + 2))
    if scale == "tanh":
        slope = 4 * torch.sigmoid(2 * r) * torch.sigmoid(-2 * r)  # 1 - tanh^2, without cancelling in the tail
        return slope if alpha is None else per_channel(alpha, r) * slope
    return (1 + r.abs() / LOG_CLAMP) ** -2


def affine_coupling(
    x: Tensor,
    params: Tensor,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    scale: str = "exp",
    layout: str = "scale_shift",
    last: bool = False,
    inverse: bool = False,
    keep_output: bool = False,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns (y, logdet); see :func:`genfast.ops.affine_coupling` for the arguments.

    ``last`` transforms the last C' channels instead of the first; ``keep_output`` does not change
    the values (it says what the backward recomputes from).
    """
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):  # accumulate in float32
        x, params = x.float(), params.float()
        alpha = None if alpha is None else alpha.float()
    r, t = split_params(params, scale, layout)
    width = t.shape[1]
    if last:
        x_b, x_a = x[:, : x.shape[1] - width], x[:, x.shape[1] - width :]
    else:
        x_a, x_b = x[:, :width], x[:, width:]
    if mask is not None:  # select, so that whatever the masked parameters hold cannot leak
        t = t.masked_fill(mask, 0)
        r = None if r is None else r.masked_fill(mask, 0)
    log_s = torch.zeros_like(t) if r is None else log_scale(r, scale, alpha)
    if mask is not None:
        log_s = log_s.masked_fill(mask, 0)
    s = torch.exp(-log_s if inverse else log_s)
    if inverse:
        y_a, log_det = x_a * s - t if shift_first else (x_a - t) * s, -log_s.flatten(1).sum(1)
    else:
        y_a, log_det = (x_a + t) * s if shift_first else x_a * s + t, log_s.flatten(1).sum(1)
    y = torch.cat((x_b, y_a) if last else (y_a, x_b), dim=1)
    return y.to(dtype), log_det


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    kept: Tensor,
    params: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    keep_output: bool,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form. With l = log s, l' = dl/dr and d = grad_y on the transformed channels:

    forward:  dx = s d,  dt = d,    dr = l' (s x d + grad_logdet),   s x = y - t from the output
    inverse:  dx = d/s,  dt = -d/s, dr = -l' (x d + grad_logdet),    x the output
    with the shift first: dt = s d, dr = l' (y d + grad_logdet);  inverse: dt = -d, dr = -l' ((x + t) d + grad_logdet)
    """
    dtype = kept.dtype
    if dtype in (torch.bfloat16, torch.float16):
        kept, params = kept.float(), params.float()
        grad_y = None if grad_y is None else grad_y.float()
        alpha_ = None if alpha is None else alpha.float()
    else:
        alpha_ = alpha
    r, t = split_params(params, scale, layout)
    width, channels = t.shape[1], kept.shape[1]
    if grad_y is None:
        grad_y = torch.zeros_like(kept)
    if last:
        kept_a, d, d_b = kept[:, channels - width :], grad_y[:, channels - width :], grad_y[:, : channels - width]
    else:
        kept_a, d, d_b = kept[:, :width], grad_y[:, :width], grad_y[:, width:]
    if grad_logdet is None:
        grad_logdet = torch.zeros(kept.shape[0], dtype=kept.dtype, device=kept.device)
    g = grad_logdet.to(kept.dtype).reshape(-1, *([1] * (kept.dim() - 1)))
    if mask is not None:
        t = t.masked_fill(mask, 0)
        r = None if r is None else r.masked_fill(mask, 0)
    log_s = torch.zeros_like(t) if r is None else log_scale(r, scale, alpha_)
    if mask is not None:
        log_s = log_s.masked_fill(mask, 0)
    s = torch.exp(-log_s if inverse else log_s)
    dx_a = s * d
    if inverse:
        if shift_first:
            out, dt = kept_a + t if keep_output else kept_a * s, -d
        else:
            out, dt = kept_a if keep_output else (kept_a - t) * s, -dx_a
        dlog_s = -(out * d + g)
    else:
        if shift_first:
            moved, dt = kept_a if keep_output else (kept_a + t) * s, dx_a.clone()
        else:
            moved, dt = kept_a - t if keep_output else kept_a * s, d.clone()
        dlog_s = moved * d + g
    if mask is not None:
        dt, dlog_s = dt.masked_fill(mask, 0), dlog_s.masked_fill(mask, 0)
    dr = None if r is None else dlog_s * log_scale_derivative(r, scale, alpha_)
    dalpha = kept.new_zeros(0)
    if alpha is not None and r is not None:
        axes = [i for i in range(r.dim()) if i != 1]
        dalpha = (dlog_s * torch.tanh(r)).sum(axes)
        dalpha = (dalpha.sum().reshape(1) if alpha.numel() == 1 else dalpha).to(alpha.dtype)
    dx = torch.cat((d_b, dx_a) if last else (dx_a, d_b), dim=1)
    return dx.to(dtype), join_params(dr, dt, layout).to(dtype), dalpha
