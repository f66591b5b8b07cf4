"""Affine coupling with log-determinant (NICE 1410.8516 sec. 3.2, RealNVP 1605.08803 eq. 6-9, Glow 1807.03039 table 1).

    forward   y_a = s(r) x_a + t, y_b = x_b, logdet[n] = sum log s;    inverse  x_a = (y_a - t) / s
    backward  with l = log s, d = grad_y, g = grad_logdet:
              forward  dx = s d, dt = d, dr = l'(r) (s x d + g), s x = y - t
              inverse  dx = d/s, dt = -d/s, dr = -l'(r) (x d + g), x the output

x (N, C, S), params (N, 2C', S), logdet (N,). Fused: split, scale map, product, shift, concatenation and the sum over a
sample; in the backward also the gradient of alpha. One pass each way: per transformed element the forward reads x, r, t
and writes y (16 bytes in float32), the backward reads d, x, r and writes dx, dr, dt (24; 28 from the output, which
needs t); a passed element costs 8 each way. About 30 FLOPs an element (the scale map): bound by memory bandwidth.

A tile without a transformed channel is copied. On an H200 instructions take at most 65% of the bytes' time forward and
44% backward in float32 with the sigmoid map, 137% and 97% in bfloat16, counting both branches of which a tile takes one
(benchmarks.sass; predicted, not yet run on a GPU; 86% and 54%, 180% and 115% before, when every tile computed).

A program takes one tile of channels x positions of one sample. Dense NCHW samples are taken as few long rows, and
samples smaller than a tile (and vectors) many to a tile, so that no lane idles. Each tile writes its partial sums of
logdet and grad alpha; a second, tiny reduction adds them in an order that depends on the shape alone. float32 within,
whatever the data.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._tensors import memory_format
from ._common import Aot, View, cdiv, options, output, place, tile, tiles_choice, variant, view
from ._math import exp as _exp
from ._math import inverse as _inverse
from ._math import log1p_unit as _log1p
from ._math import tanh as _tanh

# Of a tile its elements and those of a thread.
TUNABLE = {way: tiles_choice() for way in ("forward", "backward")}
_SCALES = ("exp", "sigmoid", "tanh", "softclamp", "additive")


@triton.jit
def _scale_map(r, a, SCALE: tl.constexpr, INVERSE: tl.constexpr):
    """log s, s (1/s for the inverse), d log s / dr and d log s / d alpha."""
    slope = tl.full(r.shape, 1.0, tl.float32)
    th = slope
    if SCALE == "sigmoid":
        u = r + 2.0
        z = _exp(-tl.abs(u))
        up = 1.0 + z
        log_s = tl.minimum(u, 0.0) - _log1p(z)
        by_up = _inverse(up)
        slope = tl.where(u >= 0, z, 1.0) * by_up
        if INVERSE:
            s = up * tl.where(u >= 0, 1.0, _exp(tl.abs(u)))
        else:
            s = tl.where(u >= 0, 1.0, z) * by_up
    elif SCALE == "additive":
        log_s = r
        s = slope
    else:
        log_s = r
        if SCALE == "tanh":
            e = _exp(-2.0 * tl.abs(r))
            th = _tanh(r, e)
            log_s = a * th
            by_up = _inverse(1.0 + e)
            slope = a * (4.0 * e * by_up * by_up)
        if SCALE == "softclamp":
            q = _inverse(1.0 + tl.abs(r) * 0.14476482730108395)  # 1 / log 1000
            log_s = r * q
            slope = q * q
        s = _exp(-log_s if INVERSE else log_s)
    return log_s, s, slope, th


@triton.jit
def _live(inside, mask, c, s, mc, ms, first, width, MASKED: tl.constexpr):
    """Where a parameter is: the transformed channels; and where it counts: those that the mask does not pass
    through."""
    moved = inside & (c >= first) & (c < first + width)
    live = moved
    if MASKED:
        live = moved & (tl.load(mask + c * mc + s * ms, mask=moved, other=1) == 0)
    return moved, live


@triton.jit
def _touched(row, first, width, BLOCK_C: tl.constexpr):
    """Whether a row of tiles holds a transformed channel: one that holds none is copied, and computes nothing."""
    return (row * BLOCK_C + BLOCK_C > first) & (row * BLOCK_C < first + width)


@triton.jit
def _forward(
    x,
    parameters,
    alpha,
    mask,
    y,
    logdet,
    xn,
    xc,
    xs,
    pn,
    pc,
    ps,
    yn,
    yc,
    ys,
    mc,
    ms,
    C,
    S,
    width,
    first,
    r_at,
    t_at,
    step,
    s_tiles,
    tiles,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    BATCH_IN_TILE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, c, s = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (s < S)
    given = tl.load(x + n * xn + (c * xc + s * xs), mask=inside, other=0)
    into = y + n * yn + (c * yc + s * ys)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)  # of log s, of the positions
    if _touched(k // s_tiles, first, width, BLOCK_C):
        value = given.to(tl.float32)
        _, live = _live(inside, mask, c, s, mc, ms, first, width, MASKED)
        j = c - first
        t = tl.load(parameters + n * pn + ((t_at + j * step) * pc + s * ps), mask=live, other=0).to(tl.float32)
        r = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
        if SCALE != "additive":
            r = tl.load(parameters + n * pn + ((r_at + j * step) * pc + s * ps), mask=live, other=0).to(tl.float32)
        a = 1.0
        if ALPHA == "one":
            a = tl.load(alpha).to(tl.float32)
        if ALPHA == "each":
            a = tl.load(alpha + j, mask=(j >= 0) & (j < width), other=0).to(tl.float32)
        log_s, scale, slope, th = _scale_map(r, a, SCALE, INVERSE)
        if INVERSE:
            log_s = -log_s
            out = (value - t) * scale
        else:
            out = value * scale + t
        tl.store(into, tl.where(live, out, value).to(y.dtype.element_ty), mask=inside)
        total = tl.sum(tl.where(live, log_s, 0.0), axis=0)
    else:
        tl.store(into, given, mask=inside)
    if SCALE != "additive":
        if BATCH_IN_TILE:
            at = (k // s_tiles).to(tl.int64) * S + s
            tl.store(logdet + at, total[None, :], mask=s < S)
        else:
            tl.store(logdet + n * tiles + k, tl.sum(total, axis=0))


@triton.jit
def _backward(
    grad_y,
    grad_logdet,
    kept,
    parameters,
    alpha,
    mask,
    dx,
    dparams,
    dalpha,
    gn,
    gc,
    gs,
    ln,
    kn,
    kc,
    ks,
    pn,
    pc,
    ps,
    xn,
    xc,
    xs,
    qn,
    qc,
    qs,
    mc,
    ms,
    C,
    S,
    width,
    first,
    r_at,
    t_at,
    step,
    s_tiles,
    tiles,
    HAS_Y: tl.constexpr,
    HAS_LOGDET: tl.constexpr,
    SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    KEEP_OUTPUT: tl.constexpr,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    BATCH_IN_TILE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, c, s = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (s < S)
    zero = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    d = zero
    if HAS_Y:
        d = tl.load(grad_y + n * gn + (c * gc + s * gs), mask=inside, other=0).to(tl.float32)
    into = dx + n * xn + (c * xc + s * xs)
    by_alpha = tl.zeros((BLOCK_C,), dtype=tl.float32)
    j = c - first
    if _touched(k // s_tiles, first, width, BLOCK_C):
        moved, live = _live(inside, mask, c, s, mc, ms, first, width, MASKED)
        value = zero
        r = zero
        if SCALE != "additive":
            r = tl.load(parameters + n * pn + ((r_at + j * step) * pc + s * ps), mask=live, other=0).to(tl.float32)
            if HAS_Y:
                value = tl.load(kept + n * kn + (c * kc + s * ks), mask=live, other=0).to(tl.float32)
                if INVERSE != KEEP_OUTPUT:
                    at = parameters + n * pn + ((t_at + j * step) * pc + s * ps)
                    value -= tl.load(at, mask=live, other=0).to(tl.float32)
        g = 0.0
        if HAS_LOGDET:
            if BATCH_IN_TILE:
                g = tl.load(grad_logdet + s * ln, mask=s < S, other=0).to(tl.float32)
            else:
                g = tl.load(grad_logdet + n * ln).to(tl.float32)
        a = 1.0
        if ALPHA == "one":
            a = tl.load(alpha).to(tl.float32)
        if ALPHA == "each":
            a = tl.load(alpha + j, mask=(j >= 0) & (j < width), other=0).to(tl.float32)
        log_s, scale, slope, th = _scale_map(r, a, SCALE, INVERSE)
        gx = zero
        gl = zero + g
        if HAS_Y:
            gx = d * scale
            if not KEEP_OUTPUT:
                value = value * scale  # s x, or the inverse's own output
            gl = value * d + g
        if INVERSE:
            gt = -gx
            gl = -gl
        else:
            gt = d
        tl.store(into, tl.where(live, gx, d).to(dx.dtype.element_ty), mask=inside)
        kind = dparams.dtype.element_ty
        tl.store(dparams + n * qn + ((t_at + j * step) * qc + s * qs), tl.where(live, gt, 0.0).to(kind), mask=moved)
        if SCALE != "additive":
            gr = tl.where(live, gl * slope, 0.0).to(kind)
            tl.store(dparams + n * qn + ((r_at + j * step) * qc + s * qs), gr, mask=moved)
        by_alpha = tl.sum(tl.where(live, gl * th, 0.0), axis=1)
    else:
        tl.store(into, d.to(dx.dtype.element_ty), mask=inside)
    if ALPHA == "one":
        tl.store(dalpha + n * tiles + k, tl.sum(by_alpha, axis=0))
    if ALPHA == "each":
        row = (n * s_tiles + k % s_tiles) * width
        tl.store(dalpha + row + j, by_alpha[:, None], mask=(j >= 0) & (j < width) & (c < C))


class _Call(NamedTuple):
    """One launch: the operands seen alike, the sizes after them in the argument list, and the constants."""

    views: list[View]
    mask: tuple[Tensor, int, int]
    sizes: tuple[int, ...]
    grid: tuple[int]
    rows: int  # tiles over positions and samples
    tiles: int  # tiles of a sample
    constants: dict[str, Any]


def _call(
    x: Tensor,
    params: Tensor,
    others: list[Tensor],
    params_like: list[Tensor],
    alpha: Tensor | None,
    mask: Tensor | None,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    choice: dict[str, int],
) -> _Call:
    """``others`` are shaped like x, ``params_like`` like params."""
    views = [view(t) for t in (x, *others, params, *params_like)]
    a, p = views[0], views[1 + len(others)]
    width, step = (p.c if scale == "additive" else p.c // 2), 2 if layout.endswith("interleaved") else 1
    second = 0 if scale == "additive" else 1 if step == 2 else width
    if scale == "additive":
        step = 1
    r_at, t_at = (0, second) if layout.startswith("scale") or scale == "additive" else (second, 0)
    first = a.c - width if last else 0
    each = "none" if alpha is None else "one" if alpha.shape[0] == 1 else "each"
    bytes_, mc, ms = x, 0, 0
    if mask is not None:
        m = view(mask.expand(x.shape[1:])[None].view(torch.uint8))
        bytes_, mc, ms = m.data, m.c_stride, m.s_stride if m.s > 1 else 0
    batch_in_tile = a.s == 1
    if step == 1 and mask is None and each != "each" and all(v.flat for v in views) and not a.walks_channels:
        batch_in_tile = a.c * a.s <= choice["tile"]
        g = 1 if batch_in_tile else math.gcd(a.c, width)
        first, width, r_at, t_at = (v * a.s if batch_in_tile else v // g for v in (first, width, r_at, t_at))
        views = [v.transposed() if batch_in_tile else v.grouped(g) for v in views]
    elif batch_in_tile:
        views = [v.transposed() for v in views]
    a = views[0]
    block_c, block_s = tile(a, choice["tile"])
    s_tiles = cdiv(a.s, block_s)
    tiles = cdiv(a.c, block_c) * s_tiles
    far = any(v.far for v in views)
    constants = dict(
        SCALE=scale,
        INVERSE=inverse,
        ALPHA=each,
        MASKED=mask is not None,
        BATCH_IN_TILE=batch_in_tile,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far, mask is not None, choice["each"]),
    )
    sizes = (a.c, a.s, width, first, r_at, t_at, step, s_tiles, tiles)
    return _Call(views, (bytes_, mc, ms), sizes, (a.n * tiles,), a.n * s_tiles, tiles, constants)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    keep_output: bool,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, logdet) of genfast::affine_coupling; with the shift first plain PyTorch's, as these kernels have no such
    form."""
    if shift_first:
        return reference.affine_coupling(x, params, alpha, mask, scale, layout, last, inverse, keep_output, True)
    y, batch = output(x), x.shape[0]
    if not x.numel() or scale == "additive":
        logdet = torch.zeros(batch, dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, logdet
    call = _call(x, params, [y], [], alpha, mask, scale, layout, last, inverse, TUNABLE["forward"].of(x.element_size()))
    a, out, p = call.views
    partial = y
    if scale != "additive":
        in_tile = call.constants["BATCH_IN_TILE"]
        shape = (call.tiles // (call.rows // a.n), batch) if in_tile else (batch, call.tiles)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    _forward[call.grid](
        a.data,
        p.data,
        x if alpha is None else alpha.contiguous(),
        call.mask[0],
        y,
        partial,
        *a.strides,
        *p.strides,
        *out.strides,
        *call.mask[1:],
        *call.sizes,
        **call.constants,
    )
    if scale == "additive":
        return y, logdet
    axis = 0 if in_tile else 1
    return y, partial.reshape(batch) if partial.shape[axis] == 1 else partial.sum(axis)


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
    """(dx, dparams, dalpha) of genfast::affine_coupling_backward; with the shift first plain PyTorch's."""
    if shift_first:
        return reference.affine_coupling_backward(
            grad_y, grad_logdet, kept, params, alpha, mask, scale, layout, last, inverse, keep_output, True
        )
    dx, dparams = output(kept), torch.empty_like(params, memory_format=memory_format(kept))
    dalpha = kept.new_empty(0) if alpha is None else torch.zeros_like(alpha)
    if not kept.numel():
        return dx, dparams, dalpha
    d = kept if grad_y is None else grad_y
    call = _call(
        kept,
        params,
        [d, dx],
        [dparams],
        alpha,
        mask,
        scale,
        layout,
        last,
        inverse,
        TUNABLE["backward"].of(kept.element_size()),
    )
    a, g, out, p, q = call.views
    partial = dalpha
    if alpha is not None:
        shape = (call.grid[0], 1) if call.constants["ALPHA"] == "one" else (call.rows, alpha.shape[0])
        partial = torch.empty(shape, dtype=torch.float32, device=kept.device)
    _backward[call.grid](
        g.data,
        kept if grad_logdet is None else grad_logdet,
        a.data,
        p.data,
        kept if alpha is None else alpha.contiguous(),
        call.mask[0],
        dx,
        dparams,
        partial,
        *g.strides,
        0 if grad_logdet is None else grad_logdet.stride(0),
        *a.strides,
        *p.strides,
        *out.strides,
        *q.strides,
        *call.mask[1:],
        *call.sizes,
        HAS_Y=grad_y is not None,
        HAS_LOGDET=grad_logdet is not None,
        KEEP_OUTPUT=keep_output,
        **call.constants,
    )
    return dx, dparams, dalpha if alpha is None else partial.sum(0).to(alpha.dtype)


def _variants() -> list[Aot]:
    found = []
    ones = ("xs", "ps", "ys", "ks", "gs", "qs", "ms", "ln", "step")
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        data = ("x", "parameters", "alpha", "y", "grad_y", "kept", "dx", "dparams")
        pointers = dict.fromkeys(data, f"*{kind}") | {"mask": "*u8"}
        pointers |= dict.fromkeys(("logdet", "grad_logdet", "dalpha"), "*fp32")

        def add(
            label: str,
            rows: bool,
            ones: tuple[str, ...] | None,
            pointers: dict[str, str] = pointers,
            width: int = width,
            kind: str = kind,
            **base: Any,
        ) -> None:
            block = dict(BLOCK_C=16 if rows else 1)
            base = dict(MASKED=False, BATCH_IN_TILE=False, FAR=ones is None) | block | base
            back = base | dict(HAS_Y=True, HAS_LOGDET=True, KEEP_OUTPUT=base["INVERSE"])
            for kernel, constants in ((_forward, base), (_backward, back)):
                types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
                choice = TUNABLE[kernel.fn.__name__[1:]].of(width)
                constants["BLOCK_S"] = choice["tile"] // constants["BLOCK_C"]
                launch = options(choice["tile"], ones is None, base["MASKED"], choice["each"])
                found.append(variant(f"{label} {kind}", kernel, types, constants, ones, **launch))

        for scale in _SCALES if kind == "fp32" else ("sigmoid",):  # the data's type changes loads and stores alone
            alpha = "one" if scale == "tanh" else "none"
            for inverse in (False, True):
                label = f"{scale}{' inverse' if inverse else ''}"
                add(label, False, ones, SCALE=scale, INVERSE=inverse, ALPHA=alpha)
        add("tanh alpha each masked", False, ones, SCALE="tanh", INVERSE=False, ALPHA="each", MASKED=True)
        last = tuple(name.replace("s", "c") if len(name) == 2 else name for name in ones)
        add("sigmoid inverse mask channels_last", True, last, SCALE="sigmoid", INVERSE=True, ALPHA="none", MASKED=True)
        add("tanh alpha each channels_last", True, last, SCALE="tanh", INVERSE=False, ALPHA="each")
        add("sigmoid vectors", True, last, SCALE="sigmoid", INVERSE=True, ALPHA="none", BATCH_IN_TILE=True)
        if kind == "fp16":
            continue
        add("tanh alpha each any strides", True, None, SCALE="tanh", INVERSE=True, ALPHA="each", MASKED=True)
    return found


AOT = _variants()
