"""Activation normalisation (Glow 1807.03039 sec. 3.1): y = s x + b per channel, logdet = S sum log|s|.

    backward  dx = s d, ds = sum d x + S g / s, db = sum d;   of the inverse y = (x - b) / s: dx = d / s,
              ds = -(sum d y + S g) / s, db = -sum d / s;   g = sum grad_logdet; in terms of log s, ds is multiplied by
              s

x (N, C, S), s and b (C,), logdet (N,). Fused: the affine map and the log-determinant (added up over C by one program of
each sample); in the backward dx and both sums over batch and positions. The forward reads x and writes y (8 bytes an
element in float32, 2 FLOPs), the backward reads d and x and writes dx (12 bytes, 5 FLOPs): both bound by memory
bandwidth, one pass each. Up to 'rows' programs a channel tile walk over the tiles and write one partial sum each; a
second, tiny kernel adds them in an order that depends on the shape alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, View, cdiv, options, output, place, tile, tiles_choice, variant, view

# Of a tile its elements and those of a thread. Rows, programs a channel tile: fill any GPU of today several times over,
# and keep the second kernel short.
TUNABLE = {"forward": tiles_choice(dict(tile=2048, each=16)), "backward": tiles_choice(rows=(1024, 64, 256))}


@triton.jit
def _scale(scale, c, C, LOG_SCALE: tl.constexpr):
    """s for channels c, in float32."""
    s = tl.load(scale + c, mask=c < C, other=0).to(tl.float32)
    if LOG_SCALE:
        return tl.exp(s)
    else:
        return tl.where(c < C, s, 1.0)


@triton.jit
def _forward(
    x,
    scale,
    bias,
    y,
    logdet,
    xn,
    xc,
    xs,
    yn,
    yc,
    ys,
    C,
    S,
    positions,
    s_tiles,
    tiles,
    LOG_SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    BATCH_IN_TILE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, c, p = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (p < S)
    s = _scale(scale, c, C, LOG_SCALE)
    b = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    value = tl.load(x + n * xn + (c * xc + p * xs), mask=inside, other=0).to(tl.float32)
    out = (value - b) / s if INVERSE else value * s + b
    tl.store(y + n * yn + (c * yc + p * ys), out.to(y.dtype.element_ty), mask=inside)
    if k < (s_tiles if BATCH_IN_TILE else 1):  # the first tile of each sample
        total = 0.0
        for start in range(0, C, 128):
            i = start + tl.arange(0, 128)
            log_s = tl.load(scale + i, mask=i < C, other=0).to(tl.float32)
            if not LOG_SCALE:
                log_s = tl.log(tl.where(i < C, tl.abs(log_s), 1.0))
            total += tl.sum(log_s, axis=0)
        total = total * (-positions if INVERSE else positions)
        if BATCH_IN_TILE:
            tl.store(logdet + p, tl.zeros((1, BLOCK_S), dtype=tl.float32) + total, mask=p < S)
        else:
            tl.store(logdet + n, total)


@triton.jit
def _backward(
    grad_y,
    x,
    scale,
    bias,
    dx,
    partial,
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
    s_tiles,
    tiles,
    c_tiles,
    rows,
    LOG_SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, and for each channel sum d x (inverse: sum d y) and sum d over the tiles row, row + rows, ..."""
    row = tl.program_id(0) // c_tiles
    c = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    if FAR:
        c = c.to(tl.int64)
    s = _scale(scale, c, C, LOG_SCALE)
    b = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    by_x = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    plain = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for k in range(row, tiles, rows):
        n = (k // s_tiles).to(tl.int64)
        p = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
        if FAR:
            p = p.to(tl.int64)
        inside = (c < C) & (p < S)
        d = tl.load(grad_y + n * gn + (c * gc + p * gs), mask=inside, other=0).to(tl.float32)
        value = tl.load(x + n * xn + (c * xc + p * xs), mask=inside, other=0).to(tl.float32)
        if INVERSE:
            value = tl.where(inside, (value - b) / s, 0.0)
            gx = d / s
        else:
            gx = d * s
        tl.store(dx + n * yn + (c * yc + p * ys), gx.to(dx.dtype.element_ty), mask=inside)
        by_x += d * value
        plain += d
    at = partial + row.to(tl.int64) * 2 * C + c
    tl.store(at, tl.sum(by_x, axis=1)[:, None], mask=c < C)
    tl.store(at + C, tl.sum(plain, axis=1)[:, None], mask=c < C)


@triton.jit
def _finish(
    partial,
    grad_logdet,
    scale,
    ds,
    db,
    ln,
    C,
    N,
    positions,
    rows,
    HAS_LOGDET: tl.constexpr,
    LOG_SCALE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds the partial sums in order, and the log-determinant's share."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = _scale(scale, c, C, LOG_SCALE)
    by_x = tl.zeros((BLOCK_C,), dtype=tl.float32)
    plain = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < rows)[:, None] & (c < C)[None, :]
        at = partial + (r * 2 * C)[:, None] + c[None, :]
        by_x += tl.sum(tl.load(at, mask=inside, other=0), axis=0)
        plain += tl.sum(tl.load(at + C, mask=inside, other=0), axis=0)
    g = 0.0
    if HAS_LOGDET:
        for start in range(0, N, 1024):
            i = start + tl.arange(0, 1024)
            g += tl.sum(tl.load(grad_logdet + i * ln, mask=i < N, other=0).to(tl.float32), axis=0)
        g = g * positions
    if INVERSE:
        by_s = -(by_x + g)
        if not LOG_SCALE:
            by_s = by_s / s
        plain = -plain / s
    elif LOG_SCALE:
        by_s = by_x * s + g
    else:
        by_s = by_x
        if HAS_LOGDET:
            by_s = by_x + g / s
    tl.store(ds + c, by_s.to(ds.dtype.element_ty), mask=c < C)
    tl.store(db + c, plain.to(db.dtype.element_ty), mask=c < C)


def _views(*tensors: Tensor) -> tuple[list[View], bool]:
    """The tensors as (N, C, S); vectors as one sample of N positions, so that a tile takes many."""
    views = [view(t) for t in tensors]
    vectors = views[0].s == 1
    return [v.transposed() for v in views] if vectors else views, vectors


def actnorm(x: Tensor, scale: Tensor, bias: Tensor, log_scale: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of genfast::actnorm."""
    y = output(x)
    if not x.numel():
        return y, torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    logdet = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    (a, out), vectors = _views(x, y)
    choice = TUNABLE["forward"].of(x.element_size())
    block_c, block_s = tile(a, choice["tile"])
    s_tiles = cdiv(a.s, block_s)
    tiles = cdiv(a.c, block_c) * s_tiles
    far = a.far or out.far
    _forward[(a.n * tiles,)](
        a.data,
        scale.contiguous(),
        bias.contiguous(),
        y,
        logdet,
        *a.strides,
        *out.strides,
        a.c,
        a.s,
        1 if vectors else a.s,
        s_tiles,
        tiles,
        LOG_SCALE=log_scale,
        INVERSE=inverse,
        BATCH_IN_TILE=vectors,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far, each=choice["each"]),
    )
    return y, logdet


def actnorm_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    log_scale: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dbias) of genfast::actnorm_backward."""
    dx, ds, db = output(x), torch.empty_like(scale), torch.empty_like(bias)
    channels, batch, rows, positions = x.shape[1], x.shape[0], 0, 0
    partial = torch.empty(0, dtype=torch.float32, device=x.device)
    scale, bias = scale.contiguous(), bias.contiguous()
    if x.numel():
        (a, out, g), vectors = _views(x, dx, x if grad_y is None else grad_y)
        positions = 1 if vectors else a.s
        if grad_y is None:
            dx.zero_()
        else:
            choice = TUNABLE["backward"].of(x.element_size())
            block_c, block_s = tile(a, choice["tile"])
            c_tiles, s_tiles = cdiv(a.c, block_c), cdiv(a.s, block_s)
            tiles = a.n * s_tiles
            rows = min(tiles, choice["rows"])
            far = a.far or out.far or g.far
            partial = torch.empty((rows, 2, a.c), dtype=torch.float32, device=x.device)
            _backward[(rows * c_tiles,)](
                g.data,
                a.data,
                scale,
                bias,
                dx,
                partial,
                *g.strides,
                *a.strides,
                *out.strides,
                a.c,
                a.s,
                s_tiles,
                tiles,
                c_tiles,
                rows,
                LOG_SCALE=log_scale,
                INVERSE=inverse,
                FAR=far,
                BLOCK_C=block_c,
                BLOCK_S=block_s,
                **options(block_c * block_s, far, each=choice["each"]),
            )
    if channels:
        _finish[(cdiv(channels, 16),)](
            partial,
            partial if grad_logdet is None else grad_logdet,
            scale,
            ds,
            db,
            0 if grad_logdet is None else grad_logdet.stride(0),
            channels,
            batch,
            positions,
            rows,
            HAS_LOGDET=grad_logdet is not None,
            LOG_SCALE=log_scale,
            INVERSE=inverse,
            BLOCK_C=16,
            BLOCK_R=64,
        )
    return dx, ds, db


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        pointers = dict.fromkeys(("x", "y", "grad_y", "dx", "scale", "bias", "ds", "db"), f"*{kind}")
        pointers |= dict.fromkeys(("partial", "logdet", "grad_logdet"), "*fp32")

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
                if "BLOCK_S" in constants:
                    constants["BLOCK_S"] = choice["tile"] // constants["BLOCK_C"]
                launch = options(choice["tile"], ones is None, each=choice["each"])
                found.append(variant(label, kernel, types, constants, ones, **launch))

        for inverse in (False, True):
            for log_scale in (False, True) if kind == "fp32" else (True,):
                label = f"{'inverse ' if inverse else ''}{'log scale ' if log_scale else ''}{kind}"
                base = dict(LOG_SCALE=log_scale, INVERSE=inverse, FAR=False, BATCH_IN_TILE=False, HAS_LOGDET=True)
                rows = base | dict(BLOCK_C=1, BLOCK_S=0)
                add(label, ("xs", "ys", "gs"), (_forward, _backward), **rows)
                add(label, ("ln",), (_finish,), **(base | dict(BLOCK_C=16, BLOCK_R=64)))
        last = base | dict(BLOCK_C=16, BLOCK_S=0)
        add(f"channels_last {kind}", ("xc", "yc", "gc"), (_forward, _backward), **last)
        add(f"vectors {kind}", ("xc", "yc", "gc"), (_forward,), **(last | dict(BATCH_IN_TILE=True)))
        if kind == "fp16":
            continue
        add(f"any strides {kind}", None, (_forward, _backward), **(last | dict(FAR=True)))
    return found


AOT = _variants()
