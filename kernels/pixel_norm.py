"""Pixel norm (progressive growing 1710.10196 sec. 4.2): y = x r with r = (mean_c x^2 + eps)^(-1/2) of each position.

    backward  dx = r (d - y mean_c(d y)), r and y from x again

x (N, C, S). Fused: the square, the mean, the root and the product. A program takes a block of positions through all
channels: at once where they fit a tile, else twice, the second time from the cache. From memory the forward takes 8
    bytes an element in
float32 and 4 FLOPs, the backward 12 and 9: bound by memory bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, View, cdiv, every, options, output, variant, view

# Of a tile its elements and those of a thread.
TUNABLE = {"norm": Choice(dict(tile=2048, each=16), every(tile=(1024, 2048, 4096, 8192), each=(4, 8, 16, 32)))}


@triton.jit
def _norm(
    grad_y,
    x,
    y,
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
    eps,
    s_tiles,
    BACKWARD: tl.constexpr,
    WHOLE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n = (tl.program_id(0) // s_tiles).to(tl.int64)
    p = ((tl.program_id(0) % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    first = tl.arange(0, BLOCK_C)[:, None]
    if FAR:
        p = p.to(tl.int64)
        first = first.to(tl.int64)
    x += n * xn
    y += n * yn
    grad_y += n * gn
    if WHOLE:  # every channel in one tile
        inside = (first < C) & (p < S)
        v = tl.load(x + (first * xc + p * xs), mask=inside, other=0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0)[None, :] / C + eps)
        out = v * r
        if BACKWARD:
            d = tl.load(grad_y + (first * gc + p * gs), mask=inside, other=0).to(tl.float32)
            out = r * (d - out * (tl.sum(d * out, axis=0)[None, :] / C))
        tl.store(y + (first * yc + p * ys), out.to(y.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
        products = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + first
            inside = (c < C) & (p < S)
            v = tl.load(x + (c * xc + p * xs), mask=inside, other=0).to(tl.float32)
            squares += v * v
            if BACKWARD:
                products += v * tl.load(grad_y + (c * gc + p * gs), mask=inside, other=0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(squares, axis=0)[None, :] / C + eps)
        q = tl.sum(products, axis=0)[None, :] / C * r
        for start in range(0, C, BLOCK_C):
            c = start + first
            inside = (c < C) & (p < S)
            out = tl.load(x + (c * xc + p * xs), mask=inside, other=0).to(tl.float32) * r
            if BACKWARD:
                d = tl.load(grad_y + (c * gc + p * gs), mask=inside, other=0).to(tl.float32)
                out = r * (d - out * q)
            tl.store(y + (c * yc + p * ys), out.to(y.dtype.element_ty), mask=inside)


def _blocks(a: View) -> tuple[int, int]:
    """Channels and positions of a tile: all channels where they are contiguous and fit, else whole sectors of
    positions."""
    c, s, size = triton.next_power_of_2(a.c), triton.next_power_of_2(a.s), TUNABLE["norm"]["tile"]
    if a.walks_channels:
        c = min(c, size)
        return c, min(s, size // c)
    s = min(s, max(32, size // c))
    return min(c, size // s), s


def _options(far: bool) -> dict[str, int]:
    """Launch options; 64-bit addresses need more registers than the assembler grants of itself."""
    return options(TUNABLE["norm"]["tile"], far, each=TUNABLE["norm"]["each"]) | {"maxnreg": 240 if far else 128}


def _run(grad_y: Tensor | None, x: Tensor, eps: float) -> Tensor:
    y = output(x)
    if not x.numel():
        return y
    views = [view(t) for t in (x, y, x if grad_y is None else grad_y)]
    if views[0].s == 1:  # vectors: the batch as positions, so that a tile takes many
        views = [v._replace(n=1, s=v.n, n_stride=0, s_stride=v.n_stride) for v in views]
    a, out, d = views
    block_c, block_s = _blocks(a)
    s_tiles = cdiv(a.s, block_s)
    far = a.far or out.far or d.far
    _norm[(a.n * s_tiles,)](
        d.data,
        a.data,
        y,
        *d.strides,
        *a.strides,
        *out.strides,
        a.c,
        a.s,
        eps,
        s_tiles,
        BACKWARD=grad_y is not None,
        WHOLE=block_c >= a.c,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **_options(far),
    )
    return y


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    """y of genfast::pixel_norm."""
    return _run(None, x, eps)


def pixel_norm_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """dx of genfast::pixel_norm_backward."""
    return _run(grad_y, x, eps)


def _variants() -> list[Aot]:
    found, size = [], TUNABLE["norm"]["tile"]
    for kind in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x", "y", "grad_y"), f"*{kind}") | {"eps": "fp32"}
        for backward in (False, True):
            way = "backward " if backward else ""
            for label, ones, far, block_c, block_s in (
                ("channels_last", ("xc", "yc", "gc"), False, 512, size // 512),
                ("rows", ("xs", "ys", "gs"), False, size // 32, 32),
                ("any strides", None, True, size // 32, 32),
            ):
                constants = dict(
                    BACKWARD=backward, WHOLE=label == "channels_last", FAR=far, BLOCK_C=block_c, BLOCK_S=block_s
                )
                found.append(variant(f"{way}{label} {kind}", _norm, types, constants, ones, **_options(far)))
    return found


AOT = _variants()
