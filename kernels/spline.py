"""Monotonic rational-quadratic splines with log-derivative (Durkan et al., 1906.04032, equations 4 to 8).

    shares p = softmax(logits), sizes of the bins = size (min + (1 - K min) p), knots their running sums; in the bin of
    x, of width w and height h, with slopes d0 and d1 at its ends: theta = (x - x0) / w, s = h / w, t = theta (1 -
    theta), n = s theta^2 + d0 t, e = s (1 - 2 t) + (d0 + d1) t, q = d1 theta^2 + 2 s t + d0 (1 - theta)^2:
    y = y0 + h n / e, logdet = log(s^2 q / e^2)
    inverse: r = (y - y0) / h, u = d1 r - d0 (1 - r), v = |u| + sqrt(u^2 + 4 s^2 r (1 - r)): theta = 2 s r / (v + 2 s r)
        where
    u <= 0, else v / (v + 2 s (1 - r)): the root of the quadratic, written so that nothing cancels
    backward: by theta, the bin's two starts, its two sizes and its two slopes, in closed form; a logit moves the start
        of every
    later bin and the size of its own, so its gradient is p (g_j - sum_i p_i g_i) with g_j one of two numbers or 0. The
    inverse keeps r fixed instead of theta, which then moves with the parameters the other way

x (R), logits of widths and heights (R, K), of slopes (R, K - 1 | K | K + 1) for linear | circular | no tails; y, logdet
(R).
Fused: two softmaxes, their running sums, the search, softplus (or zuko's clipped exponential) of the two slopes that
    count, the
evaluation and its logarithm. One pass over the parameters each way, the backward recomputes: with P = 3 K - 1 the
forward moves 4 (P + 3) bytes an element in float32, the backward 4 (2 P + 4), 104 and 200 at 8 bins. The bound is copy
bandwidth.

A thread takes an element and holds one row of logits at a time in registers, so that threads exchange nothing: a tile
has bins along its first axis and elements along its second. From 32 bins on two or four lanes share an element. Rows
are read by threads that lie a row apart, from lines that stay in L1 meanwhile; the gradients of the logits cross shared
memory, to be written in whole lines. What the compiler makes for sm_90 at 8 bins is about 620 instructions an element
forward and 1040 backward, issued by an H200 in 88% and 78% of the time that its memory takes in float32, in 176% and
157% in bfloat16, where issue is the bound (benchmarks.sass; predicted, not yet run on a GPU; 704 and 1185 before
divisions became reciprocals: 101% and 88%). float32 within, whatever the data. Each element has one writer, so two runs
    give the same bits.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, cdiv, variant
from ._math import exp as _exp
from ._math import inverse as _inverse
from ._math import log1p_unit as _log1p

HELD = 16  # logits of a row that a thread holds at most
# Elements of a program and its warps, where a thread takes an element.
TUNABLE = {
    way: Choice(dict(block=64, warps=2), [dict(block=32 * w * k, warps=w) for w in (1, 2, 4, 8) for k in (1, 2)])
    for way in ("forward", "backward")
}

# ---- kernels ----


@triton.jit
def _unit(v):
    """Into [0, 1], whose ends rounding may miss by a hair; NaN stays."""
    return tl.where(v < 0.0, 0.0, tl.where(v > 1.0, 1.0, v))


@triton.jit
def _clip(logits, at, known, scale, limit, ZUKO: tl.constexpr):
    """Logits as the softmax takes them, and their derivative."""
    raw = tl.load(logits + at, mask=known, other=0).to(tl.float32) * scale
    by_logit = scale
    if ZUKO:
        by_logit = _inverse(1.0 + tl.abs(raw) * (2.0 * limit))
        raw = raw * by_logit
        by_logit = by_logit * by_logit * scale
    return raw, by_logit


@triton.jit
def _at(i, row, j, step):
    """Where logits j of elements i are. Threads are to walk along elements, which Triton 3.9 chooses by itself and 3.6
    does
    not: so they are said to lie together in pairs, and not to be aligned, lest two be loaded as one."""
    return tl.max_contiguous(tl.multiple_of((i * row)[None, :] + j * step, (1, 1)), (1, 2))


@triton.jit
def _weights(logits, at, known, live, scale, limit, ZUKO: tl.constexpr):
    """e^(logit - largest), 0 beyond the last bin: bins are axis 0."""
    raw, _ = _clip(logits, at, known, scale, limit, ZUKO)
    raw = tl.where(live, raw, -float("inf"))
    return _exp(raw - tl.max(raw, axis=0)[None, :])


@triton.jit
def _sums(e, j, k):
    """Of the weights of the bins before bin k, and of its own."""
    return tl.sum(tl.where(j < k[None, :], e, 0.0), axis=0), tl.sum(tl.where(j == k[None, :], e, 0.0), axis=0)


@triton.jit
def _two_sum(a, b):
    """a + b, and what its rounding lost."""
    total = a + b
    t = total - a
    return total, (a - (total - t)) + (b - t)


@triton.jit
def _part(x, e, j, low, low_rest, least, least_rest, free, free_rest, BINS: tl.constexpr, ZUKO: tl.constexpr):
    """The bin k of x, its place in it from 0 to 1, all weights, those before k, its own.

    Bin i is (least + free e_i / S) long. The place is a difference of near numbers over a length that may be small, so
    it is
    taken of sums that are exact: weights are split at 2^-16, where 64 of the upper parts add up without rounding. A
        knot
    belongs to the bin on its right, zuko: on its left.
    """
    upper = (e + 192.0) - 192.0
    lower = e - upper
    all_upper = tl.sum(upper, axis=0)
    all_lower = tl.sum(lower, axis=0)
    total = all_upper + all_lower
    ends = low + (least * (j + 1) + (free * _inverse(total))[None, :] * tl.cumsum(e, axis=0))
    passed = (x[None, :] > ends if ZUKO else x[None, :] >= ends) & (j < BINS - 1)
    k = tl.sum(passed.to(tl.int32), axis=0)
    own = tl.sum(tl.where(j == k[None, :], e, 0.0), axis=0)
    before = tl.sum(tl.where(passed, upper, 0.0), axis=0)
    before_lower = tl.sum(tl.where(passed, lower, 0.0), axis=0)
    # (x - low - k least) S - free (sum of e before k), in pairs of a number and what its rounding lost
    n = k.to(tl.float32)
    shift = n * least
    shift_rest = tl.fma(n, least, -shift) + n * least_rest
    y, y_rest = _two_sum(x, tl.zeros_like(x) - low)
    y, more = _two_sum(y, -shift)
    y_rest += (more - low_rest) - shift_rest
    one = y * all_upper
    one_rest = tl.fma(y, all_upper, -one) + (y * all_lower + y_rest * all_upper)
    two = free * before
    two_rest = tl.fma(before, free, -two) + (free * before_lower + free_rest * before)
    place = ((one - two) + (one_rest - two_rest)) / (least * total + free * own)
    return k, _unit(place), total, before + before_lower, own


@triton.jit
def _slope(derivatives, row, i, there, least, limit, BINS: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr):
    """The spline's slope at knot i, and its derivative by its logit."""
    free = there
    column = i
    if TAILS == "linear":
        free = there & (i > 0) & (i < BINS)
        column = i - 1
    if TAILS == "circular":
        column = tl.where(i == BINS, 0, i)
    raw = tl.load(derivatives + row + column, mask=free, other=0).to(tl.float32)
    if ZUKO:
        by_logit = _inverse(1.0 + tl.abs(raw) * limit)
        value = _exp(raw * by_logit)
        by_logit = value * by_logit * by_logit
    else:
        z = _exp(-tl.abs(raw))
        value = tl.where(free, least + (tl.maximum(raw, 0.0) + _log1p(z)), 1.0)
        by_logit = tl.where(raw >= 0, 1.0, z) * _inverse(1.0 + z)
    return tl.where(raw == raw, value, raw), by_logit  # the maximum drops a NaN


@triton.jit
def _outside(x, low, high, ZUKO: tl.constexpr):
    """Where the spline does not apply. A NaN is inside, so that it comes out."""
    if ZUKO:
        return (x <= low) | (x > high)
    else:
        return (x < low) | (x > high)


@triton.jit
def _theta(part, s, d0, d1, INVERSE: tl.constexpr):
    """The place of x in its bin, or of the x whose image lies there: a root made of positive terms alone."""
    if INVERSE:
        near = 2.0 * s * part
        far = 2.0 * s * (1.0 - part)
        u = d1 * part - d0 * (1.0 - part)
        r = tl.abs(u) + tl.sqrt(u * u + near * far)
        return tl.where(u > 0.0, r, near) / (r + tl.where(u > 0.0, far, near))
    else:
        return part


@triton.jit(do_not_specialize=["step"])
def _forward(
    x,
    first,
    second,
    derivatives,
    y,
    logdet,
    first_row,
    second_row,
    derivatives_row,
    step,
    N,
    low,
    low_rest,
    high,
    first_least,
    first_least_rest,
    first_free,
    first_free_rest,
    second_low,
    second_least,
    second_free,
    least,
    limit,
    scale,
    BINS: tl.constexpr,
    TAILS: tl.constexpr,
    ZUKO: tl.constexpr,
    INVERSE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``first`` are the logits of the axis on which x lies: widths, or for the inverse heights."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FAR:
        i = i.to(tl.int64)
    j = tl.arange(0, BLOCK_K)[:, None]
    there = i < N
    known = (j < BINS) & there[None, :]
    value = tl.load(x + i, mask=there, other=0).to(tl.float32)
    e = _weights(first, _at(i, first_row, j, step), known, j < BINS, scale, limit, ZUKO)
    k, part, total, _, own = _part(
        value, e, j, low, low_rest, first_least, first_least_rest, first_free, first_free_rest, BINS, ZUKO
    )
    extent = first_least + first_free * own * _inverse(total)
    e = _weights(second, _at(i, second_row, j, step), known, j < BINS, scale, limit, ZUKO)
    second_free = second_free * _inverse(tl.sum(e, axis=0))
    before, own = _sums(e, j, k)
    to = second_low + (second_least * k + second_free * before)
    reach = second_least + second_free * own
    d0, _ = _slope(derivatives, i * derivatives_row, k, there, least, limit, BINS, TAILS, ZUKO)
    d1, _ = _slope(derivatives, i * derivatives_row, k + 1, there, least, limit, BINS, TAILS, ZUKO)
    s = extent * _inverse(reach) if INVERSE else reach * _inverse(extent)
    theta = _theta(part, s, d0, d1, INVERSE)
    rest = 1.0 - theta
    t = theta * rest
    by_e = _inverse(s * (1.0 - 2.0 * t) + (d0 + d1) * t)
    q = d1 * theta * theta + 2.0 * s * t + d0 * rest * rest
    rise = tl.log(q * (s * by_e) * (s * by_e))
    if INVERSE:
        out = to + reach * theta
        rise = -rise
    else:
        out = to + reach * ((s * theta * theta + d0 * t) * by_e)
    outside = _outside(value, low, high, ZUKO)
    if TAILS == "none":
        out = tl.where(outside, float("nan"), out)
        rise = tl.where(outside, float("nan"), rise)
    else:
        out = tl.where(outside, value, out)
        rise = tl.where(outside, 0.0, rise)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=there)
    tl.store(logdet + i, rise, mask=there)


@triton.jit
def _logit_grad(
    grad,
    logits,
    e,
    total,
    row,
    grad_row,
    i,
    j,
    k,
    step,
    known,
    before,
    own,
    by_start,
    by_size,
    free,
    outside,
    scale,
    limit,
    ZUKO: tl.constexpr,
):
    """Back from the start and the size of bin k to the logits."""
    by_total = _inverse(total)
    mean = (before * by_start + own * by_size) * by_total
    g = tl.where(j < k[None, :], by_start[None, :], tl.where(j == k[None, :], by_size[None, :], 0.0)) - mean[None, :]
    by_logit = scale
    if ZUKO:
        _, by_logit = _clip(logits, _at(i, row, j, step), known, scale, limit, ZUKO)
    g = tl.where(outside[None, :], 0.0, e * g * ((free * by_total)[None, :] * by_logit))
    tl.store(grad + (i * grad_row)[None, :] + j, g.to(grad.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["step"])
def _backward(
    grad_y,
    grad_logdet,
    x,
    first,
    second,
    derivatives,
    dx,
    dfirst,
    dsecond,
    dderivatives,
    first_row,
    second_row,
    derivatives_row,
    dfirst_row,
    dsecond_row,
    dderivatives_row,
    step,
    N,
    low,
    low_rest,
    high,
    first_least,
    first_least_rest,
    first_free,
    first_free_rest,
    second_least,
    second_free,
    least,
    limit,
    scale,
    BINS: tl.constexpr,
    TAILS: tl.constexpr,
    ZUKO: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_LOGDET: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FAR:
        i = i.to(tl.int64)
    j = tl.arange(0, BLOCK_K)[:, None]
    there = i < N
    known = (j < BINS) & there[None, :]
    value = tl.load(x + i, mask=there, other=0).to(tl.float32)
    gy = tl.zeros((BLOCK,), tl.float32)
    gl = gy
    if HAS_Y:
        gy = tl.load(grad_y + i, mask=there, other=0).to(tl.float32)
    if HAS_LOGDET:
        gl = tl.load(grad_logdet + i, mask=there, other=0).to(tl.float32)
    outside = _outside(value, low, high, ZUKO)
    e = _weights(first, _at(i, first_row, j, step), known, j < BINS, scale, limit, ZUKO)
    k, part, total, before, own = _part(
        value, e, j, low, low_rest, first_least, first_least_rest, first_free, first_free_rest, BINS, ZUKO
    )
    f = _weights(second, _at(i, second_row, j, step), known, j < BINS, scale, limit, ZUKO)
    second_total = tl.sum(f, axis=0)
    second_before, second_own = _sums(f, j, k)
    extent = first_least + first_free * own * _inverse(total)
    reach = second_least + second_free * second_own * _inverse(second_total)
    d0, d0_by_logit = _slope(derivatives, i * derivatives_row, k, there, least, limit, BINS, TAILS, ZUKO)
    d1, d1_by_logit = _slope(derivatives, i * derivatives_row, k + 1, there, least, limit, BINS, TAILS, ZUKO)
    w = reach if INVERSE else extent
    h = extent if INVERSE else reach
    by_w, by_h = _inverse(w), _inverse(h)
    s = h * by_w
    theta = _theta(part, s, d0, d1, INVERSE)
    rest = 1.0 - theta
    t = theta * rest
    by_e = _inverse(s * (1.0 - 2.0 * t) + (d0 + d1) * t)
    q = d1 * theta * theta + 2.0 * s * t + d0 * rest * rest
    by_q = _inverse(q)
    part = (s * theta * theta + d0 * t) * by_e
    above = (s * rest * rest + d1 * t) * by_e  # 1 - part
    part_theta = s * q * by_e * by_e
    log_theta = 2.0 * (d1 * theta + s * (rest - theta) - d0 * rest) * by_q
    log_theta -= 2.0 * (d0 + d1 - 2.0 * s) * (rest - theta) * by_e
    if INVERSE:
        gl = -gl
        g = -(gy * w + gl * log_theta) * _inverse(part_theta)  # what moves part moves theta the other way
        out = -g * by_h
        g_x0, g_w, g_y0, g_h = gy, gy * theta, -out, -out * part
    else:
        g = gy * h
        out = (g * part_theta + gl * log_theta) * by_w
        g_x0, g_w, g_y0, g_h = -out, -out * theta, gy, gy * part
    g_s = g * t * (d1 * theta * theta - d0 * rest * rest) * by_e * by_e + gl * 2.0 * t * (
        by_q + (d0 + d1) * (w * by_h) * by_e
    )
    g_w -= g_s * s * by_w
    g_h += g_s * by_w
    g_d0 = g * t * by_e * above + gl * (rest * rest * by_q - 2.0 * t * by_e)
    g_d1 = gl * (theta * theta * by_q - 2.0 * t * by_e) - g * t * by_e * part
    if TAILS == "none":
        out = tl.where(outside, 0.0, out)
    else:
        out = tl.where(outside, gy, out)
    tl.store(dx + i, out.to(dx.dtype.element_ty), mask=there)
    _logit_grad(
        dsecond,
        second,
        f,
        second_total,
        second_row,
        dsecond_row,
        i,
        j,
        k,
        step,
        known,
        second_before,
        second_own,
        g_x0 if INVERSE else g_y0,
        g_w if INVERSE else g_h,
        second_free,
        outside,
        scale,
        limit,
        ZUKO,
    )
    _logit_grad(
        dfirst,
        first,
        e,
        total,
        first_row,
        dfirst_row,
        i,
        j,
        k,
        step,
        known,
        before,
        own,
        g_y0 if INVERSE else g_x0,
        g_h if INVERSE else g_w,
        first_free,
        outside,
        scale,
        limit,
        ZUKO,
    )
    column = tl.arange(0, BLOCK_D)[:, None]
    left = k - 1 if TAILS == "linear" else k
    right = left + 1
    count = BINS - 1 if TAILS == "linear" else BINS if TAILS == "circular" else BINS + 1
    if TAILS == "circular":
        right = tl.where(right == BINS, 0, right)
    g_d0 = tl.where(outside, 0.0, g_d0 * d0_by_logit)
    g_d1 = tl.where(outside, 0.0, g_d1 * d1_by_logit)
    g = tl.where(column == left[None, :], g_d0[None, :], tl.where(column == right[None, :], g_d1[None, :], 0.0))
    target = dderivatives + (i * dderivatives_row)[None, :] + column
    tl.store(target, g.to(dderivatives.dtype.element_ty), mask=(column < count) & there[None, :])


# ---- launches ----


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous()


def _rows(logits: Tensor) -> tuple[Tensor, int]:
    """Logits as rows, and the step from row to row; copied only where the rows have no one step."""
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _split(params: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    return params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :]


def _block(bins: int, choice: Choice) -> tuple[int, int]:
    """Elements and warps of a program; from 32 bins on lanes share an element, so that each holds 16 logits of a
    row."""
    if bins <= HELD:
        return choice["block"], choice["warps"]
    return 32 * HELD // triton.next_power_of_2(bins), 1


def _registers(bins: int, far: bool) -> dict[str, int]:
    """Of the backward: with few bins the assembler aims at fewer registers than it needs, and spills."""
    return {"maxnreg": 128} if bins <= 8 and not far else {}


def _pair(v: float) -> tuple[float, float]:
    """v in float32, and what that lost."""
    high = struct.unpack("f", struct.pack("f", v))[0]
    return high, v - high


@functools.lru_cache(1024)
def _scalars(
    bins: int, zuko: bool, inverse: bool, options: tuple[float, ...]
) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Of the searched axis: start, end, least size of a bin and what is free beyond it, in pairs; start of the other
    axis; its least and its free size, the least slope, zuko's limit, the scale."""
    left, right, bottom, top, width, height, derivative, slope, scale = options
    if zuko:
        width = height = derivative = 0.0
    axes = (bottom, top, height), (left, right, width)
    (low, high, least), (low_2, high_2, least_2) = axes if inverse else axes[::-1]
    first = (*_pair(low), high, *_pair((high - low) * least), *_pair((high - low) * (1 - bins * least)))
    second = ((high_2 - low_2) * least_2, (high_2 - low_2) * (1 - bins * least_2))
    return first, low_2, (*second, derivative, 1 / abs(math.log(slope)) if zuko else 0.0, scale)


def _constants(
    bins: int, tails: str, convention: str, inverse: bool, n: int, steps: Sequence[int], choice: Choice
) -> dict[str, Any]:
    block, warps = _block(bins, choice)
    return dict(
        BINS=bins,
        TAILS=tails,
        ZUKO=convention == "zuko",
        INVERSE=inverse,
        FAR=n * max(steps) >= 2**31,
        BLOCK_K=triton.next_power_of_2(bins),
        BLOCK=block,
        num_warps=warps,
    )


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """(y, logdet) of genfast::rational_quadratic_spline."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    logdet = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    n, bins = x.numel(), widths.shape[-1]
    if n:
        logits, steps = zip(*map(_rows, (heights, widths, derivatives) if inverse else (widths, heights, derivatives)))
        constants = _constants(bins, tails, convention, inverse, n, steps, TUNABLE["forward"])
        first, low, rest = _scalars(bins, convention == "zuko", inverse, tuple(options))
        _forward[(cdiv(n, constants["BLOCK"]),)](
            _flat(x), *logits, y, logdet, *steps, 1, n, *first, low, *rest, **constants
        )
    return y, logdet


def rational_quadratic_spline_packed(
    x: Tensor, params: Tensor, bins: int, tails: str, convention: str, inverse: bool, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(y, logdet) of genfast::rational_quadratic_spline_packed."""
    return rational_quadratic_spline(x, *_split(params, bins), tails, convention, inverse, options)


def _launch_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n, bins, x = x.numel(), parameters[0].shape[-1], _flat(x)
    if n:
        order = (1, 0, 2) if inverse else (0, 1, 2)
        logits, steps = zip(*(_rows(parameters[i]) for i in order))
        into, grad_steps = zip(*(_rows(grads[i]) for i in order))
        constants = _constants(bins, tails, convention, inverse, n, (*steps, *grad_steps), TUNABLE["backward"])
        first, _, rest = _scalars(bins, convention == "zuko", inverse, tuple(options))
        _backward[(cdiv(n, constants["BLOCK"]),)](
            x if grad_y is None else _flat(grad_y),
            x if grad_logdet is None else _flat(grad_logdet),
            x,
            *logits,
            dx,
            *into,
            *steps,
            *grad_steps,
            1,
            n,
            *first,
            *rest,
            HAS_Y=grad_y is not None,
            HAS_LOGDET=grad_logdet is not None,
            BLOCK_D=triton.next_power_of_2(parameters[2].shape[-1]),
            **constants,
            **_registers(bins, constants["FAR"]),
        )
    return dx


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
    """(dx, dwidths, dheights, dderivatives) of genfast::rational_quadratic_spline_backward."""
    given = (widths, heights, derivatives)
    dw, dh, dd = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given)
    return (
        _launch_backward(grad_y, grad_logdet, x, given, (dw, dh, dd), tails, convention, inverse, options),
        dw,
        dh,
        dd,
    )


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
    """(dx, dparams) of genfast::rational_quadratic_spline_packed_backward."""
    dparams = torch.empty(params.shape, dtype=params.dtype, device=params.device)
    parts = _split(params, bins), _split(dparams, bins)
    return _launch_backward(grad_y, grad_logdet, x, *parts, tails, convention, inverse, options), dparams


def _variants() -> list[Aot]:
    found = []

    def add(label: str, kind: str, bins: int, tails: str, zuko: bool, inverse: bool, far: bool = False) -> None:
        base = dict(BINS=bins, TAILS=tails, ZUKO=zuko, INVERSE=inverse, FAR=far, BLOCK_K=triton.next_power_of_2(bins))
        count = {"linear": bins - 1, "circular": bins, "none": bins + 1}[tails]
        back = base | dict(HAS_Y=True, HAS_LOGDET=True, BLOCK_D=triton.next_power_of_2(count))
        for kernel, constants, launch in ((_forward, base, {}), (_backward, back, _registers(bins, far))):
            block, warps = _block(bins, TUNABLE[kernel.fn.__name__[1:]])
            sizes = [name for name in kernel.arg_names if name.endswith("_row") or name == "step"]
            types = dict.fromkeys(kernel.arg_names[: kernel.arg_names.index("first_row")], f"*{kind}")
            types |= dict.fromkeys([name for name in types if name.endswith("logdet")], "*fp32")
            floats = kernel.arg_names[kernel.arg_names.index("low") : kernel.arg_names.index("BINS")]
            types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(sizes, "i64" if far else "i32")
            ones = None if far else ()
            constants = constants | {"BLOCK": block}
            found.append(variant(f"{label} {kind}", kernel, types, constants, ones, num_warps=warps, **launch))

    for zuko in (False, True):
        for inverse in (False, True):
            label = f"{'zuko' if zuko else 'nflows'}{' inverse' if inverse else ''}"
            for bins in (8, 16, 64):
                add(f"{label}, {bins} bins", "fp32", bins, "linear", zuko, inverse)
    for bins in (2, 3, 10, 32):
        add(f"nflows, {bins} bins", "fp32", bins, "linear", False, False)
    for tails in ("circular", "none"):
        for bins in (8, 64):
            add(f"nflows, {bins} bins, {tails} tails", "fp32", bins, tails, False, bins == 8)
    for kind in ("bf16", "fp16"):
        add("nflows inverse, 8 bins", kind, 8, "linear", False, True)
        add("zuko, 64 bins", kind, 64, "linear", True, False)
    for bins in (16, 64):
        add(f"zuko inverse, {bins} bins, 64 bits", "fp32", bins, "linear", True, True, far=True)
    return found


AOT = _variants()
