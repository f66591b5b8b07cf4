"""Monotonic splines on [left, right] -> [bottom, top], elementwise: (y, logdet), logdet = log |dy/dx| of x's shape.

Rational quadratic (Durkan et al., 1906.04032, equations 4 to 8), linear and quadratic (Mueller et al., 1808.03856).
``options`` is [left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, slope, logit_scale].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SPLINE_DEFAULTS = (-1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0)


def _softclip(a: Tensor, limit: float) -> Tensor:
    return a / (1 + (a / limit).abs())


def _shares(logits: Tensor, convention: str, slope: float, scale: float) -> Tensor:
    """Positive numbers that sum to one; zuko clips the logits so that no bin is steeper or flatter than ``slope``
    allows."""
    logits = logits * scale
    return torch.softmax(_softclip(logits, math.log(slope) / 2) if convention == "zuko" else logits, dim=-1)


def _sizes(shares: Tensor, minimum: float, low: float, high: float) -> Tensor:
    return (high - low) * (minimum + (1 - shares.shape[-1] * minimum) * shares)


def _starts(sizes: Tensor, low: float) -> Tensor:
    """The left end of each bin."""
    return low + F.pad(sizes[..., :-1].cumsum(-1), (1, 0))


def _minimums(options: Sequence[float], convention: str) -> Sequence[float]:
    return (0.0, 0.0, 0.0) if convention == "zuko" else options[4:7]


def _slopes(derivatives: Tensor, tails: str, convention: str, minimum: float, slope: float) -> Tensor:
    """The derivatives at all K + 1 knots: one at the ends of linear tails, the same at both ends of circular ones."""
    d = _softclip(derivatives, math.log(slope)).exp() if convention == "zuko" else minimum + F.softplus(derivatives)
    if tails == "linear":
        return F.pad(d, (1, 1), value=1.0)
    return torch.cat([d, d[..., :1]], -1) if tails == "circular" else d


def _outside(x: Tensor, low: float, high: float, convention: str) -> Tensor:
    """Where the spline does not apply. A NaN is inside, so that it comes out. zuko counts the lower end as outside."""
    return (x <= low) | (x > high) if convention == "zuko" else (x < low) | (x > high)


def _search(x: Tensor, starts: Tensor, convention: str) -> Tensor:
    """The bin of x; a knot belongs to the bin on its right, zuko: on its left."""
    inner = starts[..., 1:]
    return ((x[..., None] > inner) if convention == "zuko" else (x[..., None] >= inner)).sum(-1)


def _pick(values: Tensor, k: Tensor) -> Tensor:
    return values.gather(-1, k[..., None])[..., 0]


def _unit(theta: Tensor) -> Tensor:
    """Rounding may leave a hair beyond the bin's ends, which a narrow bin magnifies; the derivative is that of
    theta."""
    return theta + (theta.clamp(0, 1) - theta).detach()


class _Bin(NamedTuple):
    """What the spline is in the bin of each element."""

    outside: Tensor
    k: Tensor
    x0: Tensor
    w: Tensor
    y0: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor
    theta: Tensor  # the place of x in its bin, from 0 to 1
    part: Tensor  # the place of y in its bin


def _solve(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> _Bin:
    left, right, bottom, top, *_, slope, scale = options
    min_width, min_height, min_derivative = _minimums(options, convention)
    w = _sizes(_shares(widths, convention, slope, scale), min_width, left, right)
    h = _sizes(_shares(heights, convention, slope, scale), min_height, bottom, top)
    d = _slopes(derivatives, tails, convention, min_derivative, slope)
    x_starts, y_starts = _starts(w, left), _starts(h, bottom)
    low, high = (bottom, top) if inverse else (left, right)
    outside = _outside(x, low, high, convention)
    x = torch.where(outside, (low + high) / 2, x)  # so that what is not taken has finite derivatives
    k = _search(x, y_starts if inverse else x_starts, convention)
    x0, w, y0, h = _pick(x_starts, k), _pick(w, k), _pick(y_starts, k), _pick(h, k)
    d0, d1, s = _pick(d, k), _pick(d, k + 1), h / w
    if inverse:  # a theta^2 + b theta + c = 0, divided by h; this form of the root does not cancel
        part = _unit((x - y0) / h)
        a = part * (d0 + d1 - 2 * s) + s - d0
        b = d0 - part * (d0 + d1 - 2 * s)
        theta = _unit(2 * s * part / (b + (b.square() + 4 * a * s * part).sqrt()))
    else:
        theta = _unit((x - x0) / w)
        t = theta * (1 - theta)
        part = (s * theta.square() + d0 * t) / (s + (d0 + d1 - 2 * s) * t)
    return _Bin(outside, k, x0, w, y0, h, d0, d1, theta, part)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str = "linear",
    convention: str = "nflows",
    inverse: bool = False,
    options: Sequence[float] = SPLINE_DEFAULTS,
) -> tuple[Tensor, Tensor]:
    """(y, logdet); widths and heights (*, K) and derivatives (*, K - 1 | K | K + 1) are logits, tails
    linear|circular|none."""
    dtype = x.dtype
    x = x if x.element_size() >= 4 else x.float()
    widths, heights, derivatives = (p.to(x.dtype).contiguous() for p in (widths, heights, derivatives))
    b = _solve(x, widths, heights, derivatives, tails, convention, inverse, options)
    s, t = b.h / b.w, b.theta * (1 - b.theta)
    y = b.x0 + b.w * b.theta if inverse else b.y0 + b.h * b.part
    rise = s.square() * (b.d1 * b.theta.square() + 2 * s * t + b.d0 * (1 - b.theta).square())
    logdet = (rise / (s + (b.d0 + b.d1 - 2 * s) * t).square()).log()
    beyond = x.new_full((), math.nan) if tails == "none" else x
    logdet = torch.where(b.outside, beyond * 0 if tails == "none" else 0.0, -logdet if inverse else logdet)
    return torch.where(b.outside, beyond, y).to(dtype), logdet


def _logit_gradient(
    logits: Tensor,
    k: Tensor,
    before: Tensor,
    within: Tensor,
    spread: float,
    convention: str,
    slope: float,
    scale: float,
) -> Tensor:
    """Of sizes before bin k (which move its start), within it, and after it (none), back to the logits."""
    share = _shares(logits, convention, slope, scale)
    j = torch.arange(logits.shape[-1], device=logits.device)
    at = k[..., None]
    grad = torch.where(j < at, before[..., None], torch.where(j == at, within[..., None], 0.0)) * spread
    grad = share * (grad - (share * grad).sum(-1, keepdim=True)) * scale
    return grad / (1 + (2 * scale * logits / math.log(slope)).abs()).square() if convention == "zuko" else grad


def rational_quadratic_spline_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed form. With theta = (x - x0)/w, s = h/w, t = theta (1 - theta), n = s theta^2 + d0 t, e = s + (d0 + d1
    - 2s) t, q = d1 theta^2 + 2 s t + d0 (1 - theta)^2: y = y0 + h n/e, logdet = log(s^2 q / e^2). The inverse holds y
        and solves for
    theta, so theta's derivative is taken through n/e = (y - y0)/h."""
    dtypes = [v.dtype for v in (x, widths, heights, derivatives)]
    x = x if x.element_size() >= 4 else x.float()
    widths, heights, derivatives = (p.to(x.dtype).contiguous() for p in (widths, heights, derivatives))
    gy = torch.zeros_like(x) if grad_y is None else grad_y.to(x.dtype)
    gl = torch.zeros_like(x) if grad_logdet is None else grad_logdet.to(x.dtype)
    outside, k, _, w, _, h, d0, d1, theta, part = _solve(
        x, widths, heights, derivatives, tails, convention, inverse, options
    )
    dx_outside = torch.zeros_like(gy) if tails == "none" else gy
    gy, gl = torch.where(outside, 0.0, gy), torch.where(outside, 0.0, gl)
    s, t = h / w, theta * (1 - theta)
    n, e = s * theta.square() + d0 * t, s + (d0 + d1 - 2 * s) * t
    q = d1 * theta.square() + 2 * s * t + d0 * (1 - theta).square()
    part_theta, part_s = s * q / e.square(), (theta.square() * e - n * (1 - 2 * t)) / e.square()
    part_d0, part_d1 = t * (e - n) / e.square(), -t * n / e.square()
    q_theta = 2 * (d1 * theta + s * (1 - 2 * theta) - d0 * (1 - theta))
    log_theta = q_theta / q - 2 * (d0 + d1 - 2 * s) * (1 - 2 * theta) / e
    log_s = 2 / s + 2 * t / q - 2 * (1 - 2 * t) / e
    log_d0, log_d1 = (1 - theta).square() / q - 2 * t / e, theta.square() / q - 2 * t / e
    if inverse:
        gl = -gl
        g = -(gy * w + gl * log_theta) / part_theta  # what moves part moves theta the other way
        dx0, dw, dx, dy0, dh = gy, gy * theta, -g / h, g / h, g * part / h
    else:
        g = gy * h
        dx = (g * part_theta + gl * log_theta) / w
        dx0, dw, dy0, dh = -dx, -dx * theta, gy, gy * part
    ds = g * part_s + gl * log_s
    dw, dh = dw - ds * s / w, dh + ds / w
    dd0, dd1 = g * part_d0 + gl * log_d0, g * part_d1 + gl * log_d1

    left, right, bottom, top, *_, slope, scale = options
    min_width, min_height, min_derivative = _minimums(options, convention)
    bins = widths.shape[-1]
    x_spread, y_spread = (right - left) * (1 - bins * min_width), (top - bottom) * (1 - bins * min_height)
    grad_widths = _logit_gradient(widths, k, dx0, dw, x_spread, convention, slope, scale)
    grad_heights = _logit_gradient(heights, k, dy0, dh, y_spread, convention, slope, scale)
    j = torch.arange(bins + 1, device=x.device)
    at = k[..., None]
    grad = torch.where(j == at, dd0[..., None], torch.where(j == at + 1, dd1[..., None], 0.0))
    if tails == "linear":
        grad = grad[..., 1:-1]
    elif tails == "circular":
        grad = torch.cat([grad[..., :1] + grad[..., -1:], grad[..., 1:-1]], -1)
    if convention == "zuko":
        clipped = derivatives / math.log(slope)
        grad = grad * _softclip(derivatives, math.log(slope)).exp() / (1 + clipped.abs()).square()
    else:
        grad = grad * torch.sigmoid(derivatives)
    found = (torch.where(outside, dx_outside, dx), grad_widths, grad_heights, grad)
    dx, dw, dh, dd = (v.to(dtype) for v, dtype in zip(found, dtypes))
    return dx, dw, dh, dd


def _parts(params: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    return params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :]


def rational_quadratic_spline_packed(
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: str = "linear",
    convention: str = "nflows",
    inverse: bool = False,
    options: Sequence[float] = SPLINE_DEFAULTS,
) -> tuple[Tensor, Tensor]:
    """The same of parameters (*, P): K widths, K heights, then the derivatives."""
    return rational_quadratic_spline(x, *_parts(params, bins), tails, convention, inverse, options)


def rational_quadratic_spline_packed_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    params: Tensor,
    bins: int,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    dx, *grads = rational_quadratic_spline_backward(
        grad_y, grad_logdet, x, *_parts(params, bins), tails, convention, inverse, options
    )
    return dx, torch.cat(grads, -1)


def _scaled(
    x: Tensor, params: Sequence[Tensor], inverse: bool, options: Sequence[float]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x on the unit interval, and where it was outside its domain."""
    left, right, bottom, top, *_ = options
    low, high = (bottom, top) if inverse else (left, right)
    x = x if x.element_size() >= 4 else x.float()
    outside = _outside(x, low, high, "nflows")
    u = (torch.where(outside, (low + high) / 2, x) - low) / (high - low)
    return u, outside, [p.to(x.dtype).contiguous() for p in params]


def _unscaled(
    u: Tensor, logdet: Tensor, x: Tensor, outside: Tensor, tails: str, inverse: bool, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    left, right, bottom, top, *_ = options
    low, high = (left, right) if inverse else (bottom, top)
    logdet = logdet + math.log((top - bottom) / (right - left))
    beyond = u.new_full((), math.nan) if tails == "none" else x.to(u.dtype)
    y = torch.where(outside, beyond, low + (high - low) * u).to(x.dtype)
    return y, torch.where(outside, beyond * 0 if tails == "none" else 0.0, -logdet if inverse else logdet)


def linear_spline(
    x: Tensor,
    unnormalized_pdf: Tensor,
    tails: str = "linear",
    inverse: bool = False,
    options: Sequence[float] = SPLINE_DEFAULTS,
) -> tuple[Tensor, Tensor]:
    """K bins of equal width, softmax(unnormalized_pdf) high."""
    u, outside, (pdf,) = _scaled(x, [unnormalized_pdf], inverse, options)
    share = torch.softmax(pdf, -1)
    bins, starts = share.shape[-1], _starts(share, 0.0)
    k = _search(u, starts, "nflows") if inverse else (u.detach() * bins).nan_to_num().long().clamp(0, bins - 1)
    h, start = _pick(share, k), _pick(starts, k)
    v = (k + _unit((u - start) / h)) / bins if inverse else start + _unit(u * bins - k) * h
    return _unscaled(v, (h * bins).log(), x, outside, tails, inverse, options)


def quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    tails: str = "linear",
    inverse: bool = False,
    options: Sequence[float] = SPLINE_DEFAULTS,
) -> tuple[Tensor, Tensor]:
    """A density that is linear in each of K bins: heights are the density's logits at the knots, K - 1 (linear tails,
    which fix the ends at one) or K + 1."""
    u, outside, (widths, heights) = _scaled(x, [widths, heights], inverse, options)
    min_width, min_height = options[4:6]
    w = _sizes(torch.softmax(widths, -1), min_width, 0.0, 1.0)
    v = F.softplus(heights) + 1e-3
    if tails == "linear":  # nflows' ends: near the area, by which they are divided; w/2 for w/4 would make them it
        first, last = w[..., :1] / 4, w[..., -1:] / 4
        inner = first * v[..., :1] + last * v[..., -1:] + ((v[..., :-1] + v[..., 1:]) / 2 * w[..., 1:-1]).sum(-1, True)
        ends = inner / (1 - first - last)
        v = torch.cat([ends, v, ends], -1)
    area = ((v[..., :-1] + v[..., 1:]) / 2 * w).sum(-1, keepdim=True)
    v = min_height + (1 - min_height) * v / area
    mass = (v[..., :-1] + v[..., 1:]) / 2 * w
    starts, below = _starts(w, 0.0), _starts(mass, 0.0)
    k = _search(u, below if inverse else starts, "nflows")
    v0, v1, w0, start, base = _pick(v, k), _pick(v, k + 1), _pick(w, k), _pick(starts, k), _pick(below, k)
    if inverse:  # (v1 - v0)/2 w a^2 + v0 w a = u - base; this form of the root does not cancel
        rise = _unit((u - base) / _pick(mass, k)) * (v0 + v1) / 2
        a = _unit(2 * rise / (v0 + (v0.square() + 2 * (v1 - v0) * rise).sqrt()))
        out = start + a * w0
    else:
        a = _unit((u - start) / w0)
        out = base + w0 * a * (v0 + (v1 - v0) * a / 2)
    return _unscaled(out, (v0 + (v1 - v0) * a).log(), x, outside, tails, inverse, options)
