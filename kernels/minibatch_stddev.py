"""Minibatch standard deviation (progressive growing 1710.10196 sec. 3; StyleGAN2's layer).

The batch is M groups of G members, sample n = g M + m; v is the variance of an element over g, t[m, f] the mean of
(v + eps)^(1/2) over the elements of feature f, and y = [x | t].

    backward  dx = d + k (x - mean_g x) / (v + eps)^(1/2), k[m, f] = sum of the gradient of t over group and positions,
    over G
              and the number of elements

x (N, C, S), y (N, C + F, S). Fused: the copy of x with both moments, shifted by the group's first member, which keeps v
exact to G rounding errors; a second, small kernel adds the partial sums in order and writes the channels of t. The
backward sums the gradient of t first and then takes x and d once (x a second time from the cache, for its group's
mean). 8 bytes an element in float32, backward 12; some 6 FLOPs: bound by memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, View, cdiv, every, options, output, tile, tiles_choice, variant, view

PARTS = 256  # partial sums that the second kernel reads at once
# Of a tile its elements and those of a thread; parts, programs a group and feature.
TUNABLE = {
    "forward": Choice(
        dict(tile=1024, each=8, parts=256), every(tile=(512, 1024, 2048), each=(4, 8), parts=(64, 256, 1024))
    ),
    "backward": tiles_choice(),
}


@triton.jit
def _moments(x, c, s, inside, xn, xc, xs, m, M, G, eps, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The group's first member, the mean of what the others differ from it, and the standard deviation."""
    first = tl.load(x + m * xn + (c * xc + s * xs), mask=inside, other=0).to(tl.float32)
    once = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    square = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for g in range(1, G):
        value = tl.load(x + (g * M + m) * xn + (c * xc + s * xs), mask=inside, other=0).to(tl.float32)
        once += value - first
        square += (value - first) * (value - first)
    mean = once / G
    variance = (square - once * mean) / G
    return first, mean, tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)


@triton.jit
def _forward(
    x,
    y,
    partial,
    xn,
    xc,
    xs,
    yn,
    yc,
    ys,
    C,
    S,
    M,
    G,
    F,
    eps,
    s_tiles,
    tiles,
    parts,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Copies a group's feature, the tiles part, part + parts, ..., and sums its standard deviations. C: of a
    feature."""
    cell = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    m = (cell // F).to(tl.int64)
    base = (cell % F) * C
    total = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for k in range(part, tiles, parts):
        c = ((k // s_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
        s = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
        inside = (c < C) & (s < S)
        c += base
        if FAR:
            c = c.to(tl.int64)
            s = s.to(tl.int64)
        _, _, deviation = _moments(x, c, s, inside, xn, xc, xs, m, M, G, eps, BLOCK_C, BLOCK_S)
        total += tl.where(inside, deviation, 0.0)
        for g in range(G):
            n = g * M + m
            value = tl.load(x + n * xn + (c * xc + s * xs), mask=inside, other=0)
            tl.store(y + n * yn + (c * yc + s * ys), value, mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def _fill(
    partial, y, yn, yc, ys, C, S, M, F, elements, parts, FAR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr
):
    """The channel of one sample and feature. C: of x."""
    n = tl.program_id(0) // F
    f = tl.program_id(0) % F
    total = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(partial + ((n % M) * F + f) * parts + p, mask=p < parts, other=0)
    t = tl.sum(total, axis=0) / elements
    at = y + n.to(tl.int64) * yn + (C + f).to(tl.int64) * yc
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        if FAR:
            s = s.to(tl.int64)
        value = tl.zeros((BLOCK_S,), dtype=tl.float32) + t
        tl.store(at + s * ys, value.to(y.dtype.element_ty), mask=s < S)


@triton.jit
def _gather(grad_y, k, gn, gc, gs, C, S, M, G, F, count, FAR: tl.constexpr, BLOCK_S: tl.constexpr):
    """k of one group and feature. C: of x."""
    m = (tl.program_id(0) // F).to(tl.int64)
    at = grad_y + (C + tl.program_id(0) % F).to(tl.int64) * gc
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for g in range(G):
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            if FAR:
                s = s.to(tl.int64)
            total += tl.load(at + (g * M + m) * gn + s * gs, mask=s < S, other=0).to(tl.float32)
    tl.store(k + tl.program_id(0), tl.sum(total, axis=0) / count)


@triton.jit
def _backward(
    grad_y,
    x,
    k,
    dx,
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
    M,
    G,
    F,
    eps,
    s_tiles,
    tiles,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx of a tile of a group's feature. C: of a feature."""
    cell = tl.program_id(0) // tiles
    place = tl.program_id(0) % tiles
    m = (cell // F).to(tl.int64)
    c = ((place // s_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    s = ((place % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    inside = (c < C) & (s < S)
    c += (cell % F) * C
    if FAR:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    first, mean, deviation = _moments(x, c, s, inside, xn, xc, xs, m, M, G, eps, BLOCK_C, BLOCK_S)
    factor = tl.load(k + cell) / deviation
    for g in range(G):
        n = g * M + m
        value = tl.load(x + n * xn + (c * xc + s * xs), mask=inside, other=0).to(tl.float32)
        d = tl.load(grad_y + n * gn + (c * gc + s * gs), mask=inside, other=0).to(tl.float32)
        out = d + factor * ((value - first) - mean)
        tl.store(dx + n * yn + (c * yc + s * ys), out.to(dx.dtype.element_ty), mask=inside)


def _options(elements: int, far: bool, choice: dict[str, int]) -> dict[str, int]:
    """Launch options; 64-bit addresses need more registers than the assembler grants of itself."""
    return options(elements, far, each=choice["each"]) | {"maxnreg": 240 if far else 128}


def _tiles(a: View, features: int, choice: dict[str, int]) -> tuple[int, int, int, int]:
    """A tile of a feature, and how many there are along positions and in all."""
    part = a._replace(c=a.c // features)
    block_c, block_s = tile(part, choice["tile"])
    s_tiles = cdiv(part.s, block_s)
    return block_c, block_s, s_tiles, cdiv(part.c, block_c) * s_tiles


def minibatch_stddev(x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    """y of genfast::minibatch_stddev."""
    y = output(x, x.shape[1] + features)
    if not x.numel():
        return y
    a, out = view(x), view(y)
    group = min(group_size, a.n)
    m, channels = a.n // group, a.c // features
    choice = TUNABLE["forward"].of(x.element_size())
    block_c, block_s, s_tiles, tiles = _tiles(a, features, choice)
    parts = min(tiles, choice["parts"])
    far = a.far or out.far
    partial = torch.empty((m, features, parts), dtype=torch.float32, device=x.device)
    _forward[(m * features * parts,)](
        a.data,
        y,
        partial,
        *a.strides,
        *out.strides,
        channels,
        a.s,
        m,
        group,
        features,
        eps,
        s_tiles,
        tiles,
        parts,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **_options(block_c * block_s, far, choice),
    )
    _fill[(a.n * features,)](
        partial,
        y,
        *out.strides,
        a.c,
        a.s,
        m,
        features,
        float(channels * a.s),
        parts,
        FAR=far,
        BLOCK_P=PARTS,
        BLOCK_S=256,
    )
    return y


def minibatch_stddev_backward(grad_y: Tensor, x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    """dx of genfast::minibatch_stddev_backward."""
    dx = output(x)
    if not x.numel():
        return dx
    a, out, d = view(x), view(dx), view(grad_y)
    group = min(group_size, a.n)
    m, channels = a.n // group, a.c // features
    choice = TUNABLE["backward"].of(x.element_size())
    block_c, block_s, s_tiles, tiles = _tiles(a, features, choice)
    far = a.far or out.far or d.far
    k = torch.empty((m, features), dtype=torch.float32, device=x.device)
    _gather[(m * features,)](
        d.data, k, *d.strides, a.c, a.s, m, group, features, float(group * channels * a.s), FAR=far, BLOCK_S=256
    )
    _backward[(m * features * tiles,)](
        d.data,
        a.data,
        k,
        dx,
        *d.strides,
        *a.strides,
        *out.strides,
        channels,
        a.s,
        m,
        group,
        features,
        eps,
        s_tiles,
        tiles,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **_options(block_c * block_s, far, choice),
    )
    return dx


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        pointers = dict.fromkeys(("x", "y", "grad_y", "dx"), f"*{kind}") | dict.fromkeys(("partial", "k"), "*fp32")
        pointers |= dict.fromkeys(("eps", "elements", "count"), "fp32")
        for label, ones, far, block_c in (
            ("rows", ("xs", "ys", "gs"), False, 1),
            ("channels_last", ("xc", "yc", "gc"), False, 64),
            ("any strides", None, True, 64),
        ):
            for kernel in (_forward, _fill, _gather, _backward):
                tiled = kernel in (_forward, _backward)
                choice = TUNABLE["forward" if kernel in (_forward, _fill) else "backward"].of(width)
                base = dict(
                    FAR=far, BLOCK_C=block_c, BLOCK_S=choice["tile"] // block_c if tiled else 256, BLOCK_P=PARTS
                )
                constants = {name: value for name, value in base.items() if name in kernel.arg_names}
                types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
                launch = _options(choice["tile"], far, choice) if tiled else {}
                found.append(variant(f"{label} {kind}", kernel, types, constants, ones, **launch))
    return found


AOT = _variants()
