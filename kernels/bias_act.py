"""Bias and activation (StyleGAN2 1912.04958; NVlabs' bias_act): y = clamp(gain f(x + b), -c, c), nine f, b (C,) or
none.

    backward      dx = gain f'(v) d where |gain f(v)| <= c, db = sum dx, with v = x + b
    second order  gain f''(v) d e in the same places, and its sum, with e the gradient of dx

x (N, C, S). Fused: the sum, f, the gain and the clamp; in the derivatives, which recompute v, also the sums over batch
and positions. One pass each: the forward reads x and writes y (8 bytes an element in float32), the backward reads d and
x and writes dx (12), the second order reads e too (16). At most 40 FLOPs: bound by memory bandwidth. For the sums, up
to 'rows' programs a channel tile walk over the tiles and write one partial sum each, added in an order that depends on
the shape alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, View, cdiv, options, output, place, tile, tiles_choice, variant, view
from ._math import exp, inverse, log1p_unit, tanh_of

# Of a tile its elements and those of a thread; rows, programs a channel tile, as in actnorm.
TUNABLE = {"forward": tiles_choice(dict(tile=2048, each=16)), "backward": tiles_choice(rows=(1024, 64, 256))}
CODES = {"linear": 0, "relu": 1, "lrelu": 2, "tanh": 3, "sigmoid": 4, "elu": 5, "selu": 6, "softplus": 7, "swish": 8}


@triton.jit
def _activation(v, alpha, ACT: tl.constexpr):
    """f, f' and f''; what is not used is compiled away."""
    f = v
    slope = v * 0 + 1.0
    curvature = v * 0
    if ACT == 1:
        f = tl.where(v <= 0, 0.0, v)
        slope = tl.where(v > 0, 1.0, 0.0)
    elif ACT == 2:
        f = tl.where(v > 0, v, alpha * v)
        slope = tl.where(v > 0, slope, alpha)
    elif ACT == 3:
        f = tanh_of(v)
        e = exp(-2.0 * tl.abs(v))
        by_up = inverse(1.0 + e)
        slope = 4.0 * e * by_up * by_up
        curvature = -2.0 * f * slope
    elif (ACT == 5) | (ACT == 6):
        scale: tl.constexpr = 1.0507009873554805 if ACT == 6 else 1.0
        left: tl.constexpr = 1.0507009873554805 * 1.6732632423543773 if ACT == 6 else 1.0
        low = tl.where(v > 0, 0.0, v)
        t = tanh_of(0.5 * low)
        f = tl.where(v > 0, scale * v, left * (2.0 * t / (1.0 - t)))  # e^v - 1, which does not cancel
        e = left * exp(low)
        slope = tl.where(v > 0, scale, e)
        curvature = tl.where(v > 0, 0.0, e)
    elif ACT >= 4:
        e = exp(-tl.abs(v))
        big = inverse(1.0 + e)
        small = e * big
        s = tl.where(v < 0, small, big)
        rest = tl.where(v < 0, big, small)
        if ACT == 4:
            f = s
            slope = s * rest
            curvature = slope * (rest - s)
        elif ACT == 7:
            f = tl.where(v < 0, 0.0, v) + log1p_unit(e)
            slope = s
            curvature = s * rest
        else:
            f = v * s
            slope = s * (1.0 + v * rest)
            curvature = s * rest * (2.0 + v * (rest - s))
    return f, slope, curvature


@triton.jit
def _forward(
    x,
    bias,
    y,
    xn,
    xc,
    xs,
    yn,
    yc,
    ys,
    C,
    S,
    alpha,
    gain,
    clamp,
    s_tiles,
    tiles,
    ACT: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, _, c, s = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (s < S)
    v = tl.load(x + n * xn + (c * xc + s * xs), mask=inside, other=0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    out, _, _ = _activation(v, alpha, ACT)
    out = out * gain
    if CLAMP:  # NaN passes
        out = tl.where(out > clamp, clamp, out)
        out = tl.where(out < -clamp, -clamp, out)
    tl.store(y + n * yn + (c * yc + s * ys), out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _derivative(
    grad_dx,
    grad_y,
    x,
    bias,
    dx,
    partial,
    en,
    ec,
    es,
    gn,
    gc,
    gs,
    xn,
    xc,
    xs,
    yn,
    yc,
    ys,
    C,
    S,
    alpha,
    gain,
    clamp,
    s_tiles,
    tiles,
    c_tiles,
    rows,
    ACT: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, or what grad_dx gives x; with a bias, for each channel its sum over the tiles row, row + rows, ..."""
    row = tl.program_id(0) // c_tiles
    c = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    if FAR:
        c = c.to(tl.int64)
    total = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for k in range(row, tiles, rows):
        n = (k // s_tiles).to(tl.int64)
        s = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
        if FAR:
            s = s.to(tl.int64)
        inside = (c < C) & (s < S)
        v = tl.load(x + n * xn + (c * xc + s * xs), mask=inside, other=0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
        d = tl.load(grad_y + n * gn + (c * gc + s * gs), mask=inside, other=0).to(tl.float32)
        f, slope, curvature = _activation(v, alpha, ACT)
        if SECOND:
            e = tl.load(grad_dx + n * en + (c * ec + s * es), mask=inside, other=0).to(tl.float32)
            out = d * e * (curvature * gain)
        else:
            out = d * (slope * gain)
        if CLAMP:
            out = tl.where(tl.abs(f * gain) > clamp, 0.0, out)
        tl.store(dx + n * yn + (c * yc + s * ys), out.to(dx.dtype.element_ty), mask=inside)
        if BIAS:
            total += out
    if BIAS:
        tl.store(partial + row.to(tl.int64) * C + c, tl.sum(total, axis=1)[:, None], mask=c < C)


def _options(elements: int, far: bool, each: int = 8) -> dict[str, int]:
    """Launch options of a derivative's tile, whose sums need more registers than the assembler grants of itself."""
    return options(elements, far, each=each) | {"maxnreg": 240 if far else 128}


def _seen(bias: Tensor | None, *tensors: Tensor) -> list[View]:
    """The tensors as (N, C, S): vectors as one sample of N positions; without a bias and all dense alike, as one long
    row."""
    first = tensors[0]
    dense = first.is_contiguous(memory_format=memory_format(first))
    if bias is None and dense and all(t.stride() == first.stride() for t in tensors):
        return [View(t, 1, 1, t.numel(), 0, 0, 1) for t in tensors]
    views = [view(t) for t in tensors]
    return [v.transposed() for v in views] if views[0].s == 1 else views


def bias_act(x: Tensor, bias: Tensor | None, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    """y of genfast::bias_act."""
    y = output(x)
    if not x.numel():
        return y
    a, out = _seen(bias, x, y)
    choice = TUNABLE["forward"].of(x.element_size())
    block_c, block_s = tile(a, choice["tile"])
    s_tiles = cdiv(a.s, block_s)
    tiles = cdiv(a.c, block_c) * s_tiles
    far = a.far or out.far
    _forward[(a.n * tiles,)](
        a.data,
        x if bias is None else bias.contiguous(),
        y,
        *a.strides,
        *out.strides,
        a.c,
        a.s,
        alpha,
        gain,
        0.0 if clamp is None else clamp,
        s_tiles,
        tiles,
        ACT=CODES[act],
        BIAS=bias is not None,
        CLAMP=clamp is not None,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far, each=choice["each"]),
    )
    return y


def _derive(
    grad_dx: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    dx = output(x)
    if not x.numel():
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    a, out, d, e = _seen(bias, x, dx, grad_y, grad_y if grad_dx is None else grad_dx)
    choice = TUNABLE["backward"].of(x.element_size())
    block_c, block_s = tile(a, choice["tile"])
    c_tiles, s_tiles = cdiv(a.c, block_c), cdiv(a.s, block_s)
    tiles = a.n * s_tiles
    rows = tiles if bias is None else min(tiles, choice["rows"])
    far = a.far or out.far or d.far or e.far
    partial = torch.empty((rows, a.c) if bias is not None else 0, dtype=torch.float32, device=x.device)
    _derivative[(rows * c_tiles,)](
        e.data,
        d.data,
        a.data,
        x if bias is None else bias.contiguous(),
        dx,
        partial,
        *e.strides,
        *d.strides,
        *a.strides,
        *out.strides,
        a.c,
        a.s,
        alpha,
        gain,
        0.0 if clamp is None else clamp,
        s_tiles,
        tiles,
        c_tiles,
        rows,
        ACT=CODES[act],
        SECOND=grad_dx is not None,
        BIAS=bias is not None,
        CLAMP=clamp is not None,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **_options(block_c * block_s, far, choice["each"]),
    )
    return dx, x.new_empty(0) if bias is None else partial.sum(0).to(bias.dtype)


def bias_act_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, act: str, alpha: float, gain: float, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """(dx, dbias) of genfast::bias_act_backward."""
    return _derive(None, grad_y, x, bias, act, alpha, gain, clamp)


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
    """(gradient of x, gradient of bias) of genfast::bias_act_second."""
    return _derive(grad_dx, grad_y, x, bias, act, alpha, gain, clamp)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        pointers = dict.fromkeys(("x", "y", "grad_y", "grad_dx", "dx", "bias"), f"*{kind}") | {"partial": "*fp32"}
        pointers |= dict.fromkeys(("alpha", "gain", "clamp"), "fp32")

        def add(
            label: str,
            ones: tuple[str, ...] | None,
            kernels: Any,
            pointers: Any = pointers,
            width: int = width,
            **base: Any,
        ) -> None:
            for kernel in kernels:
                types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
                constants = {name: value for name, value in base.items() if name in kernel.arg_names}
                choice = TUNABLE["forward" if kernel is _forward else "backward"].of(width)
                constants["BLOCK_S"] = choice["tile"] // constants["BLOCK_C"]
                launch = (options if kernel is _forward else _options)(
                    choice["tile"], ones is None, each=choice["each"]
                )
                found.append(variant(label, kernel, types, constants, ones, **launch))

        both, rows = (_forward, _derivative), dict(BLOCK_C=1, BLOCK_S=0, FAR=False, SECOND=False)
        last = rows | dict(BLOCK_C=64)
        along, across = ("xs", "ys", "gs", "es"), ("xc", "yc", "gc", "ec")
        for act, code in CODES.items() if kind == "fp32" else [("lrelu", 2), ("swish", 8)]:
            base = dict(ACT=code, BIAS=True, CLAMP=True)
            add(f"{act} {kind}", along, both, **(rows | base))
            if code > 2:
                add(f"{act} second {kind}", along, (_derivative,), **(rows | base | dict(SECOND=True)))
        base = dict(ACT=2, BIAS=True, CLAMP=False)
        add(f"channels_last {kind}", across, both, **(last | base))
        add(f"no bias {kind}", along, both, **(rows | base | dict(BIAS=False)))
        if kind == "fp16":
            continue
        add(f"any strides {kind}", None, both, **(last | base | dict(ACT=8, CLAMP=True, SECOND=True, FAR=True)))
    return found


AOT = _variants()
