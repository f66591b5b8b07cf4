"""Squeezing (RealNVP 1605.08803 sec. 3.6): f x f blocks of positions to channels and back, in both channel orders.

    y[c', h, w] = x[c, h f + i, w f + j], c' = c f^2 + i f + j ("pixel_unshuffle") or (i f + j) C + c ("space_to_depth")

(N, C, H, W) <-> (N, f^2 C, H/f, W/f). A pure move: each element is read once and written once (8 bytes in float32, no
FLOP), bound by memory bandwidth, one pass. A program takes a tile of rows of the unsqueezed tensor, along W in NCHW and
along C in channels_last, so that on its side memory is walked in order and on the other in f runs at once that fill
whole sectors. Pairs of columns are split in registers where f is 2 in NCHW, so that both sides move vectors:
instructions take 48% of the bytes' time on an H200 in float32, 65% in bfloat16 (benchmarks.sass; predicted, not yet run
on a GPU; 83% and 163% before, with one element a store). Only rows are divided into their two axes, not elements.
Elements move as integers of their size, whatever their type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, cdiv, options, tiles_choice, variant

# Of a tile its elements and those of a thread.
TUNABLE = {"move": tiles_choice()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _move(
    x,
    y,
    xn,
    xc,
    xh,
    xw,
    yn,
    yc,
    yh,
    yw,
    C,
    H,
    W,
    row_tiles,
    tiles,
    F: tl.constexpr,
    INVERSE: tl.constexpr,
    DEPTH_FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """C, H, W and the strides x. are those of the unsqueezed side; ``INVERSE`` moves from y to x."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles
    rows = ((k % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    inner = ((k // row_tiles) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    if FAR:
        rows = rows.to(tl.int64)
        inner = inner.to(tl.int64)
    if CHANNELS_LAST:
        c = inner
        h = rows // W
        w = rows % W
        inside = (h < H) & (c < C)
    else:
        c = rows // H
        h = rows % H
        w = inner
        inside = (c < C) & (w < W)
    wide = x + n * xn + (c * xc + h * xh + w * xw)
    if PAIRS:  # even and odd columns, which go to two channels, each moved in whole vectors
        half = (k // row_tiles) * (BLOCK_I // 2) + tl.arange(0, BLOCK_I // 2)[None, :]
        if FAR:
            half = half.to(tl.int64)
        there = (c < C) & (half < W // 2)
        step = C if DEPTH_FIRST else 1  # from an even column's channel to the odd one's
        to_c = (h % 2) * 2 * C + c if DEPTH_FIRST else c * 4 + (h % 2) * 2
        even = y + n * yn + (to_c * yc + (h // 2) * yh + half * yw)
        odd = even + step * yc
        if INVERSE:
            pairs = tl.join(tl.load(even, mask=there), tl.load(odd, mask=there))
            tl.store(wide, tl.reshape(pairs, (BLOCK_R, BLOCK_I)), mask=inside)
        else:
            pairs = tl.reshape(tl.load(wide, mask=inside), (BLOCK_R, BLOCK_I // 2, 2))
            evens, odds = tl.split(pairs)
            tl.store(even, evens, mask=there)
            tl.store(odd, odds, mask=there)
    else:
        offset = (h % F) * F + w % F
        if DEPTH_FIRST:
            to_c = offset * C + c
        else:
            to_c = c * (F * F) + offset
        deep = y + n * yn + (to_c * yc + (h // F) * yh + (w // F) * yw)
        if INVERSE:
            tl.store(wide, tl.load(deep, mask=inside), mask=inside)
        else:
            tl.store(deep, tl.load(wide, mask=inside), mask=inside)


def squeeze(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    """y of genfast::squeeze."""
    f, (n, c, h, w) = factor, x.shape
    shape = (n, c // (f * f), h * f, w * f) if inverse else (n, c * f * f, h // f, w // f)
    form = memory_format(x)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    if not y.numel():
        return y
    if x.element_size() not in _INTEGERS:
        raise TypeError(f"squeeze: x has dtype {x.dtype}, expected elements of at most 8 bytes")
    kind = _INTEGERS[x.element_size()]
    source, target = x.view(kind), y.view(kind)
    wide, deep = (target, source) if inverse else (source, target)
    _, c, h, w = wide.shape
    last = form is not torch.contiguous_format
    rows, inner = (h * w, c) if last else (c * h, w)
    choice = TUNABLE["move"].of(x.element_size())
    block_i = min(triton.next_power_of_2(inner), choice["tile"])
    block_r = min(triton.next_power_of_2(rows), choice["tile"] // block_i)
    row_tiles = cdiv(rows, block_r)
    tiles = row_tiles * cdiv(inner, block_i)
    far = any(sum(size * stride for size, stride in zip(t.shape[1:], t.stride()[1:])) >= 2**31 for t in (wide, deep))
    _move[(n * tiles,)](
        wide,
        deep,
        *wide.stride(),
        *deep.stride(),
        c,
        h,
        w,
        row_tiles,
        tiles,
        F=f,
        INVERSE=inverse,
        DEPTH_FIRST=order == "space_to_depth",
        CHANNELS_LAST=last,
        PAIRS=f == 2 and not last,
        FAR=far,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        **options(block_r * block_i, far, each=choice["each"]),
    )
    return y


def _variants() -> list[Aot]:
    found = []
    elements, each = TUNABLE["move"]["tile"], TUNABLE["move"]["each"]
    base = dict(F=2, PAIRS=True, FAR=False, BLOCK_R=elements // 64, BLOCK_I=64)
    for inverse in (False, True):
        for depth in (False, True):
            for last in (False, True):
                name = f"{'unsqueeze' if inverse else 'squeeze'}{' space_to_depth' if depth else ''}"
                constants = base | dict(INVERSE=inverse, DEPTH_FIRST=depth, CHANNELS_LAST=last, PAIRS=not last)
                ones = ("xc", "yc") if last else ("xw", "yw")
                for kind in ("i32", "i16") if not (depth or last) else ("i32",):
                    label = f"{name}{' channels_last' if last else ''} {kind}"
                    types = dict.fromkeys(("x", "y"), f"*{kind}")
                    found.append(variant(label, _move, types, constants, ones, **options(elements, False, each=each)))
        far = base | dict(INVERSE=inverse, DEPTH_FIRST=False, CHANNELS_LAST=False, PAIRS=False, FAR=True, F=3)
        types = {"x": "*i64", "y": "*i64"}
        found.append(variant(f"{name} any strides i64", _move, types, far, **options(elements, True, each=each)))
    return found


AOT = _variants()
