"""Discretised mixture of logistics (PixelCNN++ 1701.05517 sec. 2.1, 2.2): negative log-likelihood, its gradient,
samples.

    nll = log sum_k e^l_k - log sum_k e^(l_k + sum_c log p_kc);   d l_k = g (pi_k - r_k), d log p_kc = -g r_k

In units of bins, d = v - (L-1)/2 (1 + mean), t = 2 / ((L-1) s), m = d t, w = t/2; with r = e^-|m|, q = e^-w
    p = sigma(m + w) - sigma(m - w) = (1 - q^2) r / ((r + q) (1 + q r)),
written in e^-||m| - w|, e^-(|m| + w) and e^-t, so that nothing overflows or cancels; log t is added apart where t is
small. p's derivatives are as exact: dp/d|m| = -p (1 - r^2) q / ((r + q) (1 + q r)).

params (N, P, S), P = 10 K for 3 channels and 3 K for 1, levels x (N, C, S), nll (N, S). Fused: the split into logits,
means, log-scales and coefficients, the conditioning on the colours before, all bins and both sums over K. A tile is all
K (to the next power of two) by some positions, in registers. The forward reads params and x once and writes nll (400
bytes a position of 10 components in float32), the backward reads them once and writes the gradient (800). Bound by the
issue of instructions: some 630 a component forward and 790 backward take 3.7 and 2.4 times as long as the bytes in
    float32, of which 16 / 10 goes to
the padding of 10 components to 16 (benchmarks.sass for an H200; predicted, not yet run on a GPU). The
sampler works in float64, since a pixel that rounding puts on another level would change every pixel drawn after it; it
is small.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, View, cdiv, every, options, output, variant, view
from ._math import exp, inverse, log1p_unit, tanh_of

# Of a tile its components times positions, and those of a thread, which holds ten gradients of each in the backward.
TUNABLE = {
    way: Choice(dict(tile=256, each=2), every(tile=(128, 256, 512, 1024), each=(1, 2, 4)))
    for way in ("forward", "backward")
} | {"sample": Choice(dict(tile=256, each=2), every(tile=(128, 256, 512), each=(1, 2, 4)))}


@triton.jit
def _decay(y):
    """(1 - e^-y) / y for 0 <= y <= ln2 / 2."""
    p = 1.3981999507e-3 - y * 1.9875691500e-4
    p = 8.3334519073e-3 - y * p
    p = 4.1665795894e-2 - y * p
    p = 1.6666665459e-1 - y * p
    return 1.0 - y * (5.0000001201e-1 - y * p)


@triton.jit
def _bin(d, raw, first, last, half):
    """log p, and its derivatives by d and by the log-scale."""
    log_s = tl.where(raw < -7.0, -7.0, raw)
    t = exp(-log_s) * (1.0 / half)  # half is one number: one division a program
    ad = tl.abs(d)
    m = ad * t
    w = 0.5 * t
    near = (ad - 0.5) * t
    outside = ad >= 0.5
    tight = t < 0.3465735902799726  # as far as _decay reaches
    e_near = tl.exp(-tl.abs(near))
    twice = tl.exp(-2.0 * tl.where(outside, w, m))
    e_far = e_near * twice
    other = e_near * e_far
    phi = _decay(tl.where(tight, t, 0.0))
    e_t = tl.where(outside, twice, other)
    gap = tl.where(tight, phi, 1.0 - e_t)
    # The open bins: log sigma(z), where |z| is one of the two distances above.
    inward = tl.where(first, d, -d)
    e_z = tl.where(inward >= 0, e_far, e_near)
    z = (inward + 0.5) * t
    is_open = first | last
    between = tl.log(gap) - tl.where(outside, near, 0.0) + tl.where(tight, -log_s - tl.log(half), 0.0)
    between -= log1p_unit(e_near) + log1p_unit(e_far)
    log_p = tl.where(is_open, tl.minimum(z, 0.0) - log1p_unit(e_z), between)
    by_both = inverse(tl.where(is_open, 1.0 + e_z, (1.0 + e_near) * (1.0 + e_far)))
    y = 2.0 * m
    close = y < 0.3465735902799726
    spread = tl.where(close, y * _decay(tl.where(close, y, 0.0)), 1.0 - tl.where(outside, other, twice))
    high = tl.where(outside, 1.0, e_near)
    slope = spread * high * by_both  # -d log p / d|m|
    tail = (e_far * (1.0 + e_near) + high * (1.0 + e_far)) * by_both
    beyond = tl.where(z >= 0, e_z, 1.0) * by_both  # sigma(-z)
    by_d = t * tl.where(is_open, tl.where(first, beyond, -beyond), tl.where(d < 0, slope, -slope))
    by_t = tl.where(is_open, z * beyond, w * tail + e_t * tl.where(tight, 1.0, t) * inverse(gap) - m * slope)
    return log_p, by_d, tl.where(raw < -7.0, 0.0, -by_t)


@triton.jit
def _at(block, k, K, pc):
    """The offset of parameter k of a block of K channels."""
    return (block * K + k) * pc


@triton.jit
def _level(x, c, xc, live, half):
    """A colour's level from the middle, and whether its bin is the first or the last."""
    u = tl.load(x + c * xc, mask=live, other=0).to(tl.float32) - half
    return u, u <= -half, u >= half


@triton.jit
def _softmax_sum(values):
    """The largest of each column, and the sum of the exponentials below it."""
    top = tl.max(values, axis=0)[None, :]
    return top, tl.sum(tl.exp(values - top), axis=0)[None, :]


@triton.jit
def _place(s_tiles, S, K, FAR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sample, components (a column), positions (a row), and where both and where the positions are real."""
    n = (tl.program_id(0) // s_tiles).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[:, None]
    s = ((tl.program_id(0) % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    if FAR:
        k = k.to(tl.int64)
        s = s.to(tl.int64)
    return n, k, s, (k < K) & (s < S), s < S


@triton.jit
def _forward(
    parameters,
    x,
    nll,
    pn,
    pc,
    ps,
    xn,
    xc,
    xs,
    ln,
    ls,
    S,
    K,
    top,
    s_tiles,
    COLORS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, s, inside, live = _place(s_tiles, S, K, FAR, BLOCK_K, BLOCK_S)
    half = tl.full((1, 1), 0.5, tl.float32) * top
    base = parameters + n * pn + s * ps
    levels = x + n * xn + s * xs
    logits = tl.load(base + _at(0, k, K, pc), mask=inside, other=float("-inf")).to(tl.float32)
    logits = tl.where(live, logits, 0.0)
    u0, first, last = _level(levels, 0, xc, live, half)
    d = u0 - half * tl.load(base + _at(1, k, K, pc), mask=inside, other=0).to(tl.float32)
    raw = tl.load(base + _at(2, k, K, pc), mask=inside, other=0).to(tl.float32)
    log_p, _, _ = _bin(d, raw, first, last, half)
    joint = logits + log_p
    if COLORS == 3:
        u1, first, last = _level(levels, 1, xc, live, half)
        d = u1 - half * tl.load(base + _at(4, k, K, pc), mask=inside, other=0).to(tl.float32)
        d -= u0 * tanh_of(tl.load(base + _at(3, k, K, pc), mask=inside, other=0).to(tl.float32))
        raw = tl.load(base + _at(5, k, K, pc), mask=inside, other=0).to(tl.float32)
        log_p, _, _ = _bin(d, raw, first, last, half)
        joint += log_p
        u2, first, last = _level(levels, 2, xc, live, half)
        d = u2 - half * tl.load(base + _at(7, k, K, pc), mask=inside, other=0).to(tl.float32)
        d -= u0 * tanh_of(tl.load(base + _at(6, k, K, pc), mask=inside, other=0).to(tl.float32))
        d -= u1 * tanh_of(tl.load(base + _at(9, k, K, pc), mask=inside, other=0).to(tl.float32))
        raw = tl.load(base + _at(8, k, K, pc), mask=inside, other=0).to(tl.float32)
        log_p, _, _ = _bin(d, raw, first, last, half)
        joint += log_p
    top_pi, sum_pi = _softmax_sum(logits)
    top_joint, sum_joint = _softmax_sum(joint)
    out = (top_pi - top_joint) + (tl.log(sum_pi) - tl.log(sum_joint))
    tl.store(nll + n * ln + s * ls, out, mask=live)


@triton.jit
def _backward(
    parameters,
    x,
    grad,
    dparams,
    pn,
    pc,
    ps,
    xn,
    xc,
    xs,
    ln,
    ls,
    qn,
    qc,
    qs,
    S,
    K,
    top,
    s_tiles,
    COLORS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, s, inside, live = _place(s_tiles, S, K, FAR, BLOCK_K, BLOCK_S)
    half = tl.full((1, 1), 0.5, tl.float32) * top
    base = parameters + n * pn + s * ps
    levels = x + n * xn + s * xs
    to = dparams + n * qn + s * qs
    kind = dparams.dtype.element_ty
    logits = tl.load(base + _at(0, k, K, pc), mask=inside, other=float("-inf")).to(tl.float32)
    logits = tl.where(live, logits, 0.0)
    u0, first, last = _level(levels, 0, xc, live, half)
    d = u0 - half * tl.load(base + _at(1, k, K, pc), mask=inside, other=0).to(tl.float32)
    raw = tl.load(base + _at(2, k, K, pc), mask=inside, other=0).to(tl.float32)
    log_p, by_red, by_red_scale = _bin(d, raw, first, last, half)
    joint = logits + log_p
    if COLORS == 3:
        u1, first, last = _level(levels, 1, xc, live, half)
        a = tanh_of(tl.load(base + _at(3, k, K, pc), mask=inside, other=0).to(tl.float32))
        d = u1 - half * tl.load(base + _at(4, k, K, pc), mask=inside, other=0).to(tl.float32) - u0 * a
        raw = tl.load(base + _at(5, k, K, pc), mask=inside, other=0).to(tl.float32)
        log_p, by_green, by_green_scale = _bin(d, raw, first, last, half)
        joint += log_p
        u2, first, last = _level(levels, 2, xc, live, half)
        b = tanh_of(tl.load(base + _at(6, k, K, pc), mask=inside, other=0).to(tl.float32))
        c = tanh_of(tl.load(base + _at(9, k, K, pc), mask=inside, other=0).to(tl.float32))
        d = u2 - half * tl.load(base + _at(7, k, K, pc), mask=inside, other=0).to(tl.float32) - u0 * b - u1 * c
        raw = tl.load(base + _at(8, k, K, pc), mask=inside, other=0).to(tl.float32)
        log_p, by_blue, by_blue_scale = _bin(d, raw, first, last, half)
        joint += log_p
    g = tl.load(grad + n * ln + s * ls, mask=live, other=0).to(tl.float32)
    top_pi, sum_pi = _softmax_sum(logits)
    top_joint, sum_joint = _softmax_sum(joint)
    r = tl.exp(joint - top_joint) * (g / sum_joint)
    tl.store(to + _at(0, k, K, qc), (tl.exp(logits - top_pi) * (g / sum_pi) - r).to(kind), mask=inside)
    by_red *= r
    tl.store(to + _at(1, k, K, qc), (half * by_red).to(kind), mask=inside)
    tl.store(to + _at(2, k, K, qc), (-by_red_scale * r).to(kind), mask=inside)
    if COLORS == 3:
        by_green *= r
        by_blue *= r
        tl.store(to + _at(3, k, K, qc), (by_green * u0 * (1.0 - a * a)).to(kind), mask=inside)
        tl.store(to + _at(4, k, K, qc), (half * by_green).to(kind), mask=inside)
        tl.store(to + _at(5, k, K, qc), (-by_green_scale * r).to(kind), mask=inside)
        tl.store(to + _at(6, k, K, qc), (by_blue * u0 * (1.0 - b * b)).to(kind), mask=inside)
        tl.store(to + _at(7, k, K, qc), (half * by_blue).to(kind), mask=inside)
        tl.store(to + _at(8, k, K, qc), (-by_blue_scale * r).to(kind), mask=inside)
        tl.store(to + _at(9, k, K, qc), (by_blue * u1 * (1.0 - c * c)).to(kind), mask=inside)


@triton.jit
def _tanh64(r):
    e = tl.exp(-2.0 * tl.abs(r))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(r < 0, -t, t)


@triton.jit
def _draw(base, block, mean, uniforms, uc, c, chosen, K, pc, heat, half, live, total):
    """The level of one colour, rounded half to even, and its value in [-1, 1]; -1 and NaN where there is nothing to
    draw."""
    mean += tl.load(base + _at(block, chosen, K, pc), mask=live, other=0).to(tl.float64)
    log_s = tl.load(base + _at(block + 1, chosen, K, pc), mask=live, other=0).to(tl.float64)
    u = tl.load(uniforms + c * uc, mask=live, other=0.5).to(tl.float64)
    u = tl.minimum(tl.maximum(u, 1e-5), 1.0 - 1e-5)
    scale = tl.exp(tl.where(log_s < -7.0, -7.0, log_s))
    value = mean + scale * heat * tl.log(u / (1.0 - u))
    fine = (value - value == 0.0) & (total == total)
    value = (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1.0) * half
    level = tl.floor(value + 0.5)
    odd = level - 2.0 * tl.floor(0.5 * level)
    level = tl.where((level - value == 0.5) & (odd == 1.0), level - 1.0, level)
    return tl.where(fine, level, -1.0), tl.where(fine, level / half - 1.0, float("nan"))


@triton.jit
def _sample(
    parameters,
    uniforms,
    out,
    heat_high,
    heat_low,
    pn,
    pc,
    ps,
    un,
    uc,
    us,
    yn,
    yc,
    ys,
    S,
    K,
    top,
    s_tiles,
    COLORS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, s, inside, live = _place(s_tiles, S, K, FAR, BLOCK_K, BLOCK_S)
    half = tl.full((1, 1), 0.5, tl.float64) * top
    heat = tl.full((1, 1), 0.0, tl.float64) + heat_high + heat_low  # a float64 argument arrives as a float32
    base = parameters + n * pn + s * ps
    given = uniforms + n * un + s * us
    to = out + n * yn + s * ys
    logits = tl.load(base + _at(0, k, K, pc), mask=inside, other=float("-inf")).to(tl.float64)
    logits = tl.where(live, logits, 0.0)
    p = tl.exp((logits - tl.max(logits, axis=0)[None, :]) / heat)
    total = tl.sum(p, axis=0)[None, :]
    u = tl.load(given, mask=live, other=0.5).to(tl.float64) * total
    passed = (tl.cumsum(p, axis=0) <= u) & (k < K)
    chosen = tl.minimum(tl.sum(passed.to(tl.int32), axis=0)[None, :], K - 1)
    zero = tl.zeros((1, BLOCK_S), tl.float64)
    level, red = _draw(base, 1, zero, given, uc, 1, chosen, K, pc, heat, half, live, total)
    tl.store(to, level.to(tl.int64), mask=live)
    if COLORS == 3:
        a = _tanh64(tl.load(base + _at(3, chosen, K, pc), mask=live, other=0).to(tl.float64))
        b = _tanh64(tl.load(base + _at(6, chosen, K, pc), mask=live, other=0).to(tl.float64))
        c = _tanh64(tl.load(base + _at(9, chosen, K, pc), mask=live, other=0).to(tl.float64))
        level, green = _draw(base, 4, a * red, given, uc, 2, chosen, K, pc, heat, half, live, total)
        tl.store(to + yc, level.to(tl.int64), mask=live)
        level, _ = _draw(base, 7, b * red + c * green, given, uc, 3, chosen, K, pc, heat, half, live, total)
        tl.store(to + 2 * yc, level.to(tl.int64), mask=live)


def _flat(v: View) -> View:
    """One position a sample: the batch as positions, so that a tile takes many."""
    return View(v.data, 1, v.c, v.n, 0, v.c_stride, v.n_stride) if v.s == 1 else v


def _sizes(
    a: View, colors: int, levels: int, far: bool, choice: Choice
) -> tuple[tuple[int, ...], tuple[int], dict[str, Any]]:
    """Sizes, grid and constants of a launch over params ``a``."""
    k = a.c // (10 if colors == 3 else 3)
    block_k = triton.next_power_of_2(k)
    block_s = min(max(1, choice["tile"] // block_k), triton.next_power_of_2(a.s))
    s_tiles = cdiv(a.s, block_s)
    constants = dict(COLORS=colors, FAR=far, BLOCK_K=block_k, BLOCK_S=block_s, **_options(block_k * block_s, choice))
    return (a.s, k, levels - 1, s_tiles), (a.n * s_tiles,), constants


def _options(elements: int, choice: Choice) -> dict[str, int]:
    return {"num_warps": min(8, options(elements, False, each=choice["each"])["num_warps"])}


def discretized_logistic_mixture_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """The nll of genfast::discretized_logistic_mixture_nll."""
    nll = torch.empty((params.shape[0], *params.shape[2:]), dtype=torch.float32, device=params.device)
    if not nll.numel():
        return nll
    a, b, out = (_flat(view(t)) for t in (params, x, nll.unsqueeze(1)))
    sizes, grid, constants = _sizes(a, x.shape[1], levels, a.far or b.far, TUNABLE["forward"])
    _forward[grid](a.data, b.data, nll, *a.strides, *b.strides, out.n_stride, out.s_stride, *sizes, **constants)
    return nll


def discretized_logistic_mixture_nll_backward(params: Tensor, x: Tensor, grad: Tensor, levels: int) -> Tensor:
    """The gradient of genfast::discretized_logistic_mixture_nll."""
    dparams = output(params)
    if not dparams.numel():
        return dparams
    a, b, g, out = (_flat(view(t)) for t in (params, x, grad.unsqueeze(1), dparams))
    sizes, grid, constants = _sizes(a, x.shape[1], levels, a.far or b.far or out.far, TUNABLE["backward"])
    _backward[grid](
        a.data,
        b.data,
        g.data,
        dparams,
        *a.strides,
        *b.strides,
        g.n_stride,
        g.s_stride,
        *out.strides,
        *sizes,
        **constants,
    )
    return dparams


def discretized_logistic_mixture_sample(
    params: Tensor, uniforms: Tensor, channels: int, levels: int, temperature: float
) -> Tensor:
    """The levels of genfast::discretized_logistic_mixture_sample."""
    out = torch.empty((params.shape[0], channels, *params.shape[2:]), dtype=torch.int64, device=params.device)
    if not out.numel():
        return out
    a, b, y = (_flat(view(t)) for t in (params, uniforms.float(), out))
    sizes, grid, constants = _sizes(a, channels, levels, a.far or b.far, TUNABLE["sample"])
    high = float(torch.tensor(temperature, dtype=torch.float32))
    _sample[grid](
        a.data, b.data, out, high, temperature - high, *a.strides, *b.strides, *y.strides, *sizes, **constants
    )
    return out


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = dict.fromkeys(("parameters", "dparams"), f"*{kind}") | {"x": "*i64", "out": "*i64"}
        pointers |= dict.fromkeys(("nll", "grad", "uniforms"), "*fp32") | dict.fromkeys(
            ("heat_high", "heat_low"), "fp32"
        )

        def add(
            label: str, ones: tuple[str, ...] | None, pointers: Any = pointers, kind: str = kind, **base: Any
        ) -> None:
            for kernel in (_forward, _backward, _sample):
                types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
                launch = _options(base["BLOCK_K"] * base["BLOCK_S"], TUNABLE[kernel.fn.__name__[1:]])
                found.append(variant(f"{label} {kind}", kernel, types, base, ones, **launch))

        rows, last = ("ps", "xs", "ls", "us", "ys", "qs"), ("pc", "xs", "ls", "us", "ys", "qc")
        base = dict(COLORS=3, FAR=False, BLOCK_K=16, BLOCK_S=16)
        add("3 channels", rows, **base)
        add("3 channels channels_last", last, **base)
        add("1 channel", rows, **(base | dict(COLORS=1)))
        add("3 channels, 128 components", rows, **(base | dict(BLOCK_K=128, BLOCK_S=2)))
        if kind != "fp16":
            add("any strides", None, **(base | dict(FAR=True)))
    return found


AOT = _variants()
