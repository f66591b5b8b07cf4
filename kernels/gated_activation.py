"""Gated activation (Gated PixelCNN 1606.05328 eq. 2, WaveNet 1609.03499 eq. 2): y = tanh(f + V_f) sigma(g + V_g).

    backward  with t = tanh(f + V_f), s = sigma(g + V_g): df = d s (1 - t^2), dg = d t s (1 - s), dV = their sums

x (N, 2C, S) in k groups of channels, each [f half | g half]; V none, (2C,), (N, 2C) or (N, 2C, S); y (N, C, S). Fused:
the split, the sum, both maps and their product; in the backward, which recomputes them, also the sums over what V was
spread over. One pass each way: per element of y the forward reads f and g and writes y (12 bytes in float32, 8 more
where V has positions), the backward reads d, f, g and writes df, dg (20). About 40 FLOPs: bound by memory bandwidth.
For the sums, up to 'rows' programs a channel tile walk over the tiles and write one partial sum each, added in an order
that depends on the shape alone. On an H200 instructions take 74% of the bytes' time forward in float32 and 150% in
bfloat16 (benchmarks.sass; predicted, not yet run on a GPU; 113% and 233% before, when a bias was loaded once an element
and each map divided twice).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, View, cdiv, options, output, place, tile, tiles_choice, variant, view
from ._math import exp, inverse, tanh

# Of a tile its elements and those of a thread; rows, programs a channel tile, as in actnorm.
TUNABLE = {"forward": tiles_choice(), "backward": tiles_choice(rows=(1024, 64, 256))}


@triton.jit
def _gate(f, g):
    """tanh f, 1 - tanh(f)^2, sigma(g) and 1 - sigma(g), none of which cancels."""
    e = exp(-2.0 * tl.abs(f))
    t = tanh(f, e)
    by_up = inverse(1.0 + e)
    slope = 4.0 * e * by_up * by_up
    z = exp(-tl.abs(g))
    big = inverse(1.0 + z)
    small = z * big
    return t, slope, tl.where(g < 0, small, big), tl.where(g < 0, big, small)


@triton.jit
def _load(x, bias, n, cf, cg, s, xn, xc, xs, bn, bc, bs, inside, there, BIAS: tl.constexpr, SPREAD: tl.constexpr):
    """f + V_f and g + V_g; with SPREAD V has no positions, and is loaded once a channel."""
    f = tl.load(x + n * xn + (cf * xc + s * xs), mask=inside, other=0).to(tl.float32)
    g = tl.load(x + n * xn + (cg * xc + s * xs), mask=inside, other=0).to(tl.float32)
    if BIAS and SPREAD:
        f += tl.load(bias + n * bn + cf * bc, mask=there, other=0).to(tl.float32)
        g += tl.load(bias + n * bn + cg * bc, mask=there, other=0).to(tl.float32)
    elif BIAS:
        f += tl.load(bias + n * bn + (cf * bc + s * bs), mask=inside, other=0).to(tl.float32)
        g += tl.load(bias + n * bn + (cg * bc + s * bs), mask=inside, other=0).to(tl.float32)
    return f, g


@triton.jit
def _forward(
    x,
    bias,
    y,
    xn,
    xc,
    xs,
    bn,
    bc,
    bs,
    yn,
    yc,
    ys,
    C,
    S,
    block,
    s_tiles,
    tiles,
    BIAS: tl.constexpr,
    SPREAD: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, _, c, s = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (s < S)
    cf = c + c // block * block
    f, g = _load(x, bias, n, cf, cf + block, s, xn, xc, xs, bn, bc, bs, inside, c < C, BIAS, SPREAD)
    t, _, sigma, _ = _gate(f, g)
    tl.store(y + n * yn + (c * yc + s * ys), (t * sigma).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y,
    x,
    bias,
    dx,
    partial,
    gn,
    gc,
    gs,
    xn,
    xc,
    xs,
    bn,
    bc,
    bs,
    yn,
    yc,
    ys,
    C,
    S,
    block,
    s_tiles,
    tiles,
    c_tiles,
    rows,
    BIAS: tl.constexpr,
    SPREAD: tl.constexpr,
    SUM: tl.constexpr,
    BY_SAMPLE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx; with SUM, for each channel of x the sums over the tiles row, row + rows, ... of all samples, or of this
    one."""
    row = tl.program_id(0) // c_tiles
    c = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    if FAR:
        c = c.to(tl.int64)
    cf = c + c // block * block
    total_f = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    total_g = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    first = row
    if BY_SAMPLE:
        first = row % rows
    for k in range(first, tiles, rows):
        n = (row // rows if BY_SAMPLE else k // s_tiles).to(tl.int64)
        s = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
        if FAR:
            s = s.to(tl.int64)
        inside = (c < C) & (s < S)
        f, g = _load(x, bias, n, cf, cf + block, s, xn, xc, xs, bn, bc, bs, inside, c < C, BIAS, SPREAD)
        d = tl.load(grad_y + n * gn + (c * gc + s * gs), mask=inside, other=0).to(tl.float32)
        t, slope, sigma, beyond = _gate(f, g)
        df = d * sigma * slope
        dg = d * t * sigma * beyond
        at = dx + n * yn + (cf * yc + s * ys)
        tl.store(at, df.to(dx.dtype.element_ty), mask=inside)
        tl.store(at + block * yc, dg.to(dx.dtype.element_ty), mask=inside)
        if SUM:
            total_f += df
            total_g += dg
    if SUM:
        at = partial + row.to(tl.int64) * 2 * C + cf
        tl.store(at, tl.sum(total_f, axis=1)[:, None], mask=c < C)
        tl.store(at + block, tl.sum(total_g, axis=1)[:, None], mask=c < C)


def _options(elements: int, far: bool, summed: bool, each: int = 8) -> dict[str, int]:
    """Launch options of a tile; sums over 64-bit addresses need more registers than those."""
    return options(elements, far, each=each) | ({"maxnreg": 240} if far and summed else {})


def _spread(bias: Tensor | None, x: Tensor, v: View) -> tuple[Tensor, tuple[int, int, int]]:
    """The bias and its strides along x's samples, channels and positions; x stands for a bias that is not there."""
    if bias is None:
        return x, (0, 0, 0)
    if bias.dim() == x.dim():
        b = view(bias)
        return b.data, b.strides
    return bias, (bias.stride(0) if bias.dim() == 2 else 0, bias.stride(-1), 0)


def _vectors(v: View, wide: tuple[int, int, int]) -> tuple[View, tuple[int, int, int]]:
    """One position a sample: the batch as positions, so that a tile takes many samples."""
    n, c, _ = wide
    return View(v.data, 1, v.c, v.n, 0, v.c_stride, v.n_stride), (0, c, n)


def gated_activation(x: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """y of genfast::gated_activation."""
    y = output(x, x.shape[1] // 2)
    if not y.numel():
        return y
    a, out = view(x), view(y)
    given, strides = _spread(bias, x, a)
    if a.s == 1:
        a, strides = _vectors(a, strides)
        out, _ = _vectors(out, strides)
    choice = TUNABLE["forward"].of(x.element_size())
    block_c, block_s = tile(out, choice["tile"])
    s_tiles = cdiv(a.s, block_s)
    tiles = cdiv(out.c, block_c) * s_tiles
    far = a.far or out.far
    _forward[(a.n * tiles,)](
        a.data,
        given,
        y,
        *a.strides,
        *strides,
        *out.strides,
        out.c,
        a.s,
        out.c // groups,
        s_tiles,
        tiles,
        BIAS=bias is not None,
        SPREAD=strides[2] == 0,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far, each=choice["each"]),
    )
    return y


def gated_activation_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(dx, dbias) of genfast::gated_activation_backward."""
    dx = output(x)
    summed = bias is not None and bias.shape != x.shape
    dbias = bias.new_zeros(bias.shape) if bias is not None and summed else x.new_empty(0)
    if not x.numel():
        return dx, dbias
    a, out, d = view(x), view(dx), view(grad_y)
    given, strides = _spread(bias, x, a)
    each = bias is not None and summed and bias.dim() == 2
    if a.s == 1 and not each:
        a, strides = _vectors(a, strides)
        out, _ = _vectors(out, strides)
        d, _ = _vectors(d, strides)
    channels = a.c // 2
    choice = TUNABLE["backward"].of(x.element_size())
    block_c, block_s = tile(a._replace(c=channels), choice["tile"])
    c_tiles, s_tiles = cdiv(channels, block_c), cdiv(a.s, block_s)
    tiles = s_tiles if each else a.n * s_tiles
    rows = min(tiles, max(1, choice["rows"] // a.n) if each else choice["rows"]) if summed else tiles
    outer = a.n if each else 1
    far = a.far or out.far or d.far
    partial = torch.empty((outer, rows, a.c) if summed else 0, dtype=torch.float32, device=x.device)
    _backward[(outer * rows * c_tiles,)](
        d.data,
        a.data,
        given,
        dx,
        partial,
        *d.strides,
        *a.strides,
        *strides,
        *out.strides,
        channels,
        a.s,
        channels // groups,
        s_tiles,
        tiles,
        c_tiles,
        rows,
        BIAS=bias is not None,
        SPREAD=strides[2] == 0,
        SUM=summed,
        BY_SAMPLE=each,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **_options(block_c * block_s, far, summed, choice["each"]),
    )
    if bias is None or not summed:
        return dx, dbias
    return dx, partial.sum(1).reshape(bias.shape).to(bias.dtype)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        pointers = dict.fromkeys(("x", "y", "grad_y", "dx", "bias"), f"*{kind}") | {"partial": "*fp32"}

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
                choice = TUNABLE[kernel.fn.__name__[1:]].of(width)
                constants["BLOCK_S"] = choice["tile"] // constants["BLOCK_C"]
                launch = _options(choice["tile"], ones is None, constants.get("SUM", False), choice["each"])
                found.append(variant(label, kernel, types, constants, ones, **launch))

        both, last = (_forward, _backward), dict(BLOCK_C=64)
        base = dict(BIAS=False, SPREAD=False, SUM=False, BY_SAMPLE=False, FAR=False, BLOCK_C=1, BLOCK_S=0)
        add(f"plain {kind}", ("xs", "ys", "gs"), both, **base)
        add(f"spatial bias {kind}", ("xs", "ys", "gs", "bs"), both, **(base | dict(BIAS=True)))
        add(f"bias {kind}", ("xs", "ys", "gs", "bc"), both, **(base | dict(BIAS=True, SPREAD=True, SUM=True)))
        add(
            f"bias of each sample channels_last {kind}",
            ("xc", "yc", "gc", "bc"),
            both,
            **(base | last | dict(BIAS=True, SPREAD=True, SUM=True, BY_SAMPLE=True)),
        )
        if kind != "fp16":
            add(f"any strides {kind}", None, both, **(base | last | dict(BIAS=True, SUM=True, FAR=True)))
    return found


AOT = _variants()
