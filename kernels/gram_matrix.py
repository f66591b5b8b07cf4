"""Gram matrices and the style loss (Gatys et al. 1508.06576, section 2) of features F (N, C, S), with F' = F + shift:

    G = scale F' F'^T                            dF = scale (dG + dG^T) F'
    L_n = factor sum_ij (G_nij - A_nij)^2        dF_n = 4 factor scale dL_n D_n F'_n,  D = G - (A + A^T) / 2

Only tiles of the lower triangle are computed; those on the diagonal read their rows once. A style layer has few
channels and many positions, so its tiles are too few to fill a device: the positions are split (by the shape alone),
and a second kernel adds the parts in order, scales, and writes the entry and its mirror, so that G is symmetric to the
bit; for the style loss it takes the difference and its square there, so that G itself is never written. Without a split
the product's own epilogue scales and mirrors. The backward is one product by a symmetric matrix, with the scale and the
gradient of the loss in its epilogue. The layers of a style loss share one launch of each forward kernel (two of the
first where some lie in channels_last and some do
not): pointers, sizes and strides are passed as tuples of arguments, so that nothing is copied to the device and a CUDA
    graph
can hold the call, and a program finds its layer by its number. There the positions are split such that all programs of
all layers have about the same number of steps, and all have the tile of the layer with the fewest channels.

FLOPs: C (C + BLOCK) S a sample forward, 2 C^2 S backward. Bytes: F once forward (its rows are read again by the tiles
    beside
them, from L2), F and dF once backward; C^2 floats a part between the two kernels, as many parts as leave no round of
programs nearly empty and repay their joining. In bfloat16 C FLOPs a byte, where an H200's tensor cores balance at 206:
layers of 64 and 128 channels are bound by memory, where the triangle saves nothing and one read of F is all, 256 is
balanced, 512 is bound by arithmetic with 36 of 64 tiles of 64 (10 of 16 of 128, 20 of 32 of 128 by 256 at 1024). In
float32 on FMA units, which balance at 14 FLOPs a byte, all are bound by arithmetic, so the triangle is worth up to 1.8
times.

Tiles (sm_90): 64 x 64 by 64 positions, four warps and three stages (48 KB), four programs a multiprocessor, since the
    number of
programs is what is short; 128 x 128 from 512 channels on in half types and TF32, two programs (96 KB each); 128 x 256
from 1024 on an H100 or H200 (192 KB). All products are wgmma of operands in shared memory, filled by 16-byte copies two
or three steps ahead. FMA units: 64 x 64 by 16, eight warps. Products of the backward 128 x 128 by 64 (96 KB).
Half types multiply on the tensor cores and add in float32; a shift is added in float32 and then multiplied as TF32. For
float16 the backward's matrix is divided by its largest entry, and multiplied back in the epilogue: gradients of means
are below its range.
float32 follows torch.backends.cuda.matmul.allow_tf32. Features are read where they lie, also in channels_last.

Predicted, not yet run on a GPU (bfloat16 on an H200, cuBLAS at 790 TFLOP/s): a multiprocessor gets about 39 bytes a
cycle from L2, where tiles of 128 x 128 ask for 64 at the full rate (32 on the diagonal) and of 128 x 256 for 48, so 60%
(90%) and 80% of it. Tile times alone then give 1.1 times cuBLAS's dense product at 512 channels, 1.3 at 1024 and 1.4 at
2048: 1.6 is out of reach of tiles that no cluster shares. What one sample of 512 channels and 2^14 positions gains,
    joining its 25 parts takes: 20
us, on a par; 2048 channels and 2^12 positions: 72 tiles for 132 multiprocessors, 1.1 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MULTIPROCESSORS,
    Aot,
    View,
    by_rule,
    cdiv,
    check_samples,
    hopper,
    output,
    precision,
    tile_options,
    variant,
    view,
    wide,
)
from ._common import parts as parts_of

# Each of the tile's fields that another than the rule's is tried of.
TUNABLE = {
    "forward": by_rule(*(
        dict(channels=c, halves=h, depth=d, warps=w, stages=s, registers=0, at_once=n)
        for c, h, d, w, s, n in (
            (128, 2, 64, 8, 4, 1), (128, 2, 64, 8, 3, 1), (128, 1, 64, 8, 3, 2), (128, 1, 64, 8, 4, 1), (128, 1, 64, 4,
            3, 2),
            (128, 1, 128, 8, 3, 1), (64, 2, 64, 4, 4, 2), (64, 1, 64, 4, 3, 4), (64, 1, 64, 4, 4, 3), (64, 1, 128, 4, 3,
            2),
        )
    )),
    "product": by_rule(*(
        dict(channels=c, positions=p, depth=64, warps=w, stages=s, registers=0)
        for c, p, w, s in ((128, 128, 8, 4), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (64, 128, 4, 4))
    )),
}  # fmt: skip
LARGE_FROM, WIDE_FROM = 512, 1024  # channels from which tiles of 128 by 128, and of 128 by 256, pay
LAYERS = 32  # at most so many in a launch, whose arguments have 4 KB
STEPS = 8  # at least so many steps of a product for each part
JOINING = 1.0  # weighs the steps that writing and reading a part are predicted to take


@triton.jit
def _corner(tile):
    """Row and column of a tile of the lower triangle, counted by rows."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _place(tile, BLOCK_C: tl.constexpr, HALVES: tl.constexpr):
    """First row and first column of a tile; HALVES of them, one below the other, make a square."""
    row, column = _corner(tile // HALVES)
    return (row * HALVES + tile % HALVES) * BLOCK_C, column * (BLOCK_C * HALVES)


@triton.jit
def _features(f, c, k, C, S, fc, fs, shift, LAST: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr):
    """Channels c by positions k, read along what lies together."""
    if LAST:
        inside = (k < S)[:, None] & (c < C)[None, :]
        value = tl.load(f + (k.to(tl.int64) * fs)[:, None] + (c * fc)[None, :], mask=inside, other=0)
    else:
        inside = (c < C)[:, None] & (k < S)[None, :]
        value = tl.load(f + (c.to(tl.int64) * fc)[:, None] + (k * fs)[None, :], mask=inside, other=0)
    if WIDE:
        value = value.to(tl.float32)
    if SHIFT:
        value = tl.where(inside, value.to(tl.float32) + shift, 0.0).to(value.dtype)
    return tl.trans(value) if LAST else value


@triton.jit
def _steps(
    f,
    i,
    j,
    first,
    last,
    C,
    S,
    fc,
    fs,
    shift,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ALIKE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of channels i and j over the blocks of positions from ``first`` to ``last``; ALIKE: i and j are the
    same."""
    total = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for step in range(first, tl.minimum(last, tl.cdiv(S, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a = _features(f, i, k, C, S, fc, fs, shift, LAST, SHIFT, WIDE)
        b = a
        if not ALIKE:
            b = _features(f, j, k, C, S, fc, fs, shift, LAST, SHIFT, WIDE)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _tile(
    f,
    i,
    j,
    first,
    last,
    C,
    S,
    fc,
    fs,
    shift,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_ITSELF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As _steps; with BY_ITSELF a tile on the diagonal reads its channels once, where reads from L2 are the limit."""
    if BY_ITSELF:
        if tl.min(i) == tl.min(j):
            total = _steps(f, i, i, first, last, C, S, fc, fs, shift, LAST, SHIFT, PRECISION, WIDE, True, BLOCK_K)
        else:
            total = _steps(f, i, j, first, last, C, S, fc, fs, shift, LAST, SHIFT, PRECISION, WIDE, False, BLOCK_K)
        return total
    return _steps(f, i, j, first, last, C, S, fc, fs, shift, LAST, SHIFT, PRECISION, WIDE, False, BLOCK_K)


@triton.jit
def _gram(
    f,
    out,
    C,
    S,
    fn,
    fc,
    fs,
    tiles,
    splits,
    steps,
    scale,
    shift,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_ITSELF: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile over ``steps`` blocks of positions: a part of its own, or with DIRECT the entries of G and their
    mirror."""
    n = tl.program_id(1).to(tl.int64)
    BLOCK_J: tl.constexpr = BLOCK_C * HALVES
    tile = tl.program_id(0) % tiles  # tiles of the same positions run together, so that these come from memory once
    split = tl.program_id(0) // tiles
    row, column = _place(tile, BLOCK_C, HALVES)
    i = row + tl.arange(0, BLOCK_C)
    j = column + tl.arange(0, BLOCK_J)
    total = _tile(
        f + n * fn,
        i,
        j,
        split * steps,
        split * steps + steps,
        C,
        S,
        fc,
        fs,
        shift,
        LAST,
        SHIFT,
        PRECISION,
        WIDE,
        BY_ITSELF,
        BLOCK_K,
    )
    if DIRECT:
        total *= scale
        lower = (i[:, None] < C) & (j[None, :] <= i[:, None])
        to = out + n * C * C
        tl.store(to + i[:, None] * C + j[None, :], total, mask=lower)
        tl.store(to + j[None, :] * C + i[:, None], total, mask=lower)
    else:
        to = out + ((n * tiles + tile) * splits + split) * (BLOCK_C * BLOCK_J)
        tl.store(to + (tl.arange(0, BLOCK_C) * BLOCK_J)[:, None] + tl.arange(0, BLOCK_J)[None, :], total)


@triton.jit
def _entries(
    part,
    target,
    out,
    C,
    tile,
    piece,
    splits,
    scale,
    STYLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds a tile's parts in order; writes G or, with STYLE, D, and gives the sum of (G - A)^2 over a piece of the
    tile."""
    BLOCK_J: tl.constexpr = BLOCK_C * HALVES
    e = piece * BLOCK_E + tl.arange(0, BLOCK_E)
    row, column = _place(tile, BLOCK_C, HALVES)
    i = row + e // BLOCK_J
    j = column + e % BLOCK_J
    there = (i < C) & (j <= i)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (r < splits)[:, None] & there[None, :]
        total += tl.sum(tl.load(part + r[:, None] * (BLOCK_C * BLOCK_J) + e[None, :], mask=inside, other=0), axis=0)
    total *= scale
    below, above = i * C + j, j * C + i
    squares = tl.zeros((BLOCK_E,), dtype=tl.float32)
    if STYLE:
        a = tl.load(target + below, mask=there, other=0).to(tl.float32)
        b = tl.load(target + above, mask=there, other=0).to(tl.float32)
        squares = (total - a) * (total - a) + tl.where(i == j, 0.0, (total - b) * (total - b))
        total -= (a + b) * 0.5
    tl.store(out + below, total, mask=there)
    tl.store(out + above, total, mask=there)
    return tl.sum(tl.where(there, squares, 0.0), axis=0)


@triton.jit
def _join(
    part,
    target,
    out,
    loss,
    C,
    target_stride,
    tiles,
    splits,
    scale,
    STYLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Parts to G or, with STYLE, to D and the sum of (G - A)^2 over this program's entries."""
    PIECES: tl.constexpr = BLOCK_C * BLOCK_C * HALVES // BLOCK_E
    n = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // PIECES
    at = part + (n * tiles + tile) * splits * (BLOCK_C * BLOCK_C * HALVES)
    squares = _entries(
        at,
        target + n * target_stride,
        out + n * C * C,
        C,
        tile,
        tl.program_id(0) % PIECES,
        splits,
        scale,
        STYLE,
        BLOCK_C,
        HALVES,
        BLOCK_E,
        BLOCK_R,
    )
    if STYLE:
        tl.store(loss + n * tl.num_programs(0) + tl.program_id(0), squares)


@triton.jit
def _of(values, starts, LAYERS: tl.constexpr, ALIGNED: tl.constexpr = 1):
    """The value for this program's layer; a layer's programs follow its start, which is coded as ``_coded`` says.

    ALIGNED divides it: told here and not to the caller, since Triton 3.6 forgets what is told of a call's result.
    """
    program = tl.program_id(0) * 2 + 3
    found = values[0]
    for layer in tl.static_range(1, LAYERS):
        found = tl.where(program >= starts[layer], values[layer], found)
    if ALIGNED > 1:
        found = tl.multiple_of(found, ALIGNED)
    return found


@triton.jit
def _number(values, starts, LAYERS: tl.constexpr, ALIGNED: tl.constexpr = 1):
    """As _of, of numbers that ``_coded`` made."""
    found = (_of(values, starts, LAYERS) - 3) >> 1
    if ALIGNED > 1:
        found = tl.multiple_of(found, ALIGNED)
    return found


@triton.jit
def _gram_layers(
    f,
    starts,
    channels,
    positions,
    n_strides,
    strides,
    tiles,
    splits,
    steps,
    at,
    out,
    shift,
    LAYERS: tl.constexpr,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_ITSELF: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One part of a tile of a layer. ALIGNED divides all strides and the extent of the axis whose stride is 1."""
    n = tl.program_id(1).to(tl.int64)
    x = _of(f, starts, LAYERS, 16 if ALIGNED > 1 else 1)
    C = _number(channels, starts, LAYERS, ALIGNED if LAST else 1)
    S = _number(positions, starts, LAYERS, 1 if LAST else ALIGNED)
    n_stride = _number(n_strides, starts, LAYERS, ALIGNED)
    stride = _number(strides, starts, LAYERS, ALIGNED)
    parts = _number(splits, starts, LAYERS)
    length = _number(steps, starts, LAYERS)
    x += n * n_stride
    rest = tl.program_id(0) - _number(starts, starts, LAYERS)
    of_layer = _number(tiles, starts, LAYERS)
    tile = rest % of_layer
    split = rest // of_layer
    row, column = _place(tile, BLOCK_C, 1)
    i = row + tl.arange(0, BLOCK_C)
    j = column + tl.arange(0, BLOCK_C)
    first = split * length
    if LAST:
        total = _tile(
            x, i, j, first, first + length, C, S, 1, stride, shift, LAST, SHIFT, PRECISION, WIDE, BY_ITSELF, BLOCK_K
        )
    else:
        total = _tile(
            x, i, j, first, first + length, C, S, stride, 1, shift, LAST, SHIFT, PRECISION, WIDE, BY_ITSELF, BLOCK_K
        )
    e = tl.arange(0, BLOCK_C)
    part = _number(at, starts, LAYERS) + (n * of_layer + tile) * parts + split
    tl.store(out + part * (BLOCK_C * BLOCK_C) + e[:, None] * BLOCK_C + e[None, :], total)


@triton.jit
def _join_layers(
    part,
    target,
    out,
    loss,
    starts,
    channels,
    target_strides,
    tiles,
    splits,
    at,
    to,
    scales,
    factors,
    width,
    LAYERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Parts to D, and factor times the sum of (G - A)^2 over this program's entries of a layer."""
    PIECES: tl.constexpr = BLOCK_C * BLOCK_C // BLOCK_E
    n = tl.program_id(1).to(tl.int64)
    C = _number(channels, starts, LAYERS)
    parts = _number(splits, starts, LAYERS)
    layer = 0
    for other in tl.static_range(1, LAYERS):
        layer += (tl.program_id(0) * 2 + 3 >= starts[other]).to(tl.int32)
    rest = tl.program_id(0) - _number(starts, starts, LAYERS)
    tile = rest // PIECES
    first = _number(at, starts, LAYERS) + (n * _number(tiles, starts, LAYERS) + tile) * parts
    squares = _entries(
        part + first * (BLOCK_C * BLOCK_C),
        _of(target, starts, LAYERS) + n * _number(target_strides, starts, LAYERS),
        out + _number(to, starts, LAYERS) + n * C * C,
        C,
        tile,
        rest % PIECES,
        parts,
        _of(scales, starts, LAYERS),
        True,
        BLOCK_C,
        1,
        BLOCK_E,
        BLOCK_R,
    )
    squares *= _of(factors, starts, LAYERS)
    tl.store(loss + (layer * tl.num_programs(1) + n) * width + rest, squares)


@triton.jit
def _product(
    h,
    f,
    by,
    out,
    C,
    S,
    fn,
    fc,
    fs,
    on,
    oc,
    os,
    c_tiles,
    scale,
    shift,
    LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    BY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scale by_n H_n F'_n of symmetric H (N, C, C)."""
    n = tl.program_id(1).to(tl.int64)
    c = (tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (tl.program_id(0) // c_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    h += n * C * C
    f += n * fn
    total = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(h + c[:, None] * C + k[None, :], mask=(c < C)[:, None] & (k < C)[None, :], other=0)
        b = _features(f, k, p, C, S, fc, fs, shift, LAST, SHIFT, WIDE)
        total = tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)
    total *= scale
    if BY:
        total *= tl.load(by + n)
    found = total.to(out.dtype.element_ty)
    out += n * on
    if OUT_LAST:
        to = out + (p.to(tl.int64) * os)[:, None] + (c * oc)[None, :]
        tl.store(to, tl.trans(found), mask=(p < S)[:, None] & (c < C)[None, :])
    else:
        to = out + (c.to(tl.int64) * oc)[:, None] + (p * os)[None, :]
        tl.store(to, found, mask=(c < C)[:, None] & (p < S)[None, :])


# ---- launches ----


class Tile(NamedTuple):
    """Channels (rows, and columns of the forward), positions of an output and depth of a step."""

    channels: int
    positions: int
    depth: int
    warps: int
    stages: int
    registers: int = 0  # at most, where the assembler's own choice spills
    halves: int = 1  # of the forward: a tile is ``channels`` by so many times as many
    at_once: int = 4  # of the forward: programs that a multiprocessor runs together

    @property
    def by_itself(self) -> bool:
        """Whether a tile on the diagonal is a square of its own, and large enough that a second loop pays."""
        return self.channels >= 128 and self.halves == 1

    @property
    def options(self) -> dict[str, int]:
        return tile_options(self.warps, self.stages, self.registers)


def _odd(v: View) -> bool:
    """Whether neither channels nor positions lie together, or offsets need 64 bits: addresses then take registers."""
    return v.far or 1 not in (v.c_stride, v.s_stride)


def _gram_tile(how: str, half: bool, c: int, odd: bool, widened: bool, large: bool = False) -> Tile:
    """``widened``: operands of half types that are multiplied as float32; ``large``: on a GPU whose tiles may be."""
    if odd or how == "ieee" and not half:
        return Tile(64, 64, 16, 8, 2, 224, at_once=1)
    depth = 64 if half and not widened else 32
    if c >= WIDE_FROM and large and not widened:
        return Tile(128, 256, depth, 8, 4, halves=2, at_once=1)
    if c >= LARGE_FROM and not widened:
        return Tile(128, 128, depth, 8, 3, at_once=2)
    return Tile(64, 64, depth, 4, 3)


def _product_tile(how: str, half: bool, c: int, odd: bool) -> Tile:
    if odd:
        return Tile(64, 64, 16, 8, 2, 224)
    if how == "ieee" and not half:
        return Tile(64, 64, 16, 8, 2, 224)
    return Tile(128 if c > 64 else 64, 128, 64 if half else 32, 8 if c > 64 else 4, 3)


class _Parts(NamedTuple):
    tiles: int
    splits: int
    steps: int  # of each split


def _parts(v: View, tile: Tile) -> _Parts:
    rows = cdiv(v.c, tile.channels * tile.halves)
    tiles = rows * (rows + 1) // 2 * tile.halves
    blocks = max(1, cdiv(v.s, tile.depth))
    joining = JOINING * (2 + tile.channels * tile.halves / 64) / blocks
    steps = cdiv(blocks, parts_of(tiles * v.n, MULTIPROCESSORS * tile.at_once, blocks // STEPS, joining))
    return _Parts(tiles, cdiv(blocks, steps), steps)


def _arithmetic(x: Tensor, shift: float) -> tuple[str, bool, bool]:
    """How products of the forward are taken, whether x is of a half type, and whether its operands are widened."""
    half = x.dtype is not torch.float32
    widened = half and shift != 0
    return "tf32" if widened else precision(x), half, widened


def _triangle(features: Tensor, scale: float, shift: float, direct: bool, out: Tensor) -> tuple[Tensor, _Parts, Tile]:
    """_gram: into ``out`` where one part is all there is and ``direct``, else parts."""
    v = view(features)
    check_samples("gram_matrix", v.n)
    how, half, widened = _arithmetic(features, shift)
    tile = _gram_tile(how, half, v.c, _odd(v), widened, hopper(features.device))
    tile = tile._replace(**TUNABLE["forward"].now)
    parts = _parts(v, tile)
    direct = direct and parts.splits == 1
    if not direct:
        out = out.new_empty((v.n, parts.tiles, parts.splits, tile.channels, tile.channels * tile.halves))
    _gram[(parts.tiles * parts.splits, v.n)](
        v.data,
        out,
        v.c,
        v.s,
        *v.strides,
        *parts,
        scale,
        shift,
        LAST=v.walks_channels,
        SHIFT=shift != 0,
        DIRECT=direct,
        PRECISION=how,
        WIDE=widened or wide(features),
        BY_ITSELF=tile.by_itself,
        BLOCK_C=tile.channels,
        HALVES=tile.halves,
        BLOCK_K=tile.depth,
        **tile.options,
    )
    return out, parts, tile


def _joined(part: Tensor, parts: _Parts, tile: Tile, scale: float, out: Tensor, target: Tensor | None) -> Tensor:
    """_join into ``out``; the sums of squares of each program, with a target."""
    n, c, _ = out.shape
    together = min(32, triton.next_power_of_2(parts.splits))
    entries = min(1024, 4096 // together)
    programs = parts.tiles * (tile.channels**2 * tile.halves // entries)
    loss = torch.empty((n, programs), dtype=torch.float32, device=out.device) if target is not None else part
    a = part if target is None else target.contiguous()
    stride = c * c if target is not None and target.shape[0] > 1 else 0
    _join[(programs, n)](
        part,
        a,
        out,
        loss,
        c,
        stride,
        parts.tiles,
        parts.splits,
        scale,
        STYLE=target is not None,
        BLOCK_C=tile.channels,
        HALVES=tile.halves,
        BLOCK_E=entries,
        BLOCK_R=together,
        num_warps=4,
    )
    return loss


def gram_matrix(features: Tensor, scale: float, shift: float) -> Tensor:
    """G of genfast::gram_matrix."""
    n, c = features.shape[:2]
    out = torch.empty((n, c, c), dtype=torch.float32, device=features.device)
    if not out.numel():
        return out
    if not features.numel():
        return out.zero_()
    found, parts, tile = _triangle(features, scale, shift, True, out)
    if found is not out:
        _joined(found, parts, tile, scale, out, None)
    return out


def style_loss(features: Tensor, target: Tensor, scale: float, shift: float, factor: float) -> tuple[Tensor, Tensor]:
    """(L, D) of genfast::style_loss."""
    n, c = features.shape[:2]
    out = torch.empty((n, c, c), dtype=torch.float32, device=features.device)
    if not out.numel():
        return out.new_zeros(n), out
    if not features.numel():
        a = target.float()
        out.copy_((a + a.mT) * -0.5)
        return (factor * a.square().sum((1, 2))).expand(n).contiguous(), out
    part, parts, tile = _triangle(features, scale, shift, False, out)
    return factor * _joined(part, parts, tile, scale, out, target).sum(1), out


def _far_apart(features: Sequence[Tensor], views: Sequence[View]) -> bool:
    """Whether layers cannot share a launch: an empty one, one without a stride of 1, or too many for the arguments."""
    return len(views) > LAYERS or any(_odd(v) or not f.numel() for f, v in zip(features, views))


def _layer_parts(views: Sequence[View], tile: Tile) -> list[_Parts]:
    """As _parts, with the programs of all layers alike in length."""
    rows = [cdiv(v.c, tile.channels) for v in views]
    tiles = [r * (r + 1) // 2 for r in rows]
    blocks = [cdiv(v.s, tile.depth) for v in views]
    at_once = MULTIPROCESSORS * tile.at_once
    at_once *= cdiv(sum(v.n * t for v, t in zip(views, tiles)), at_once)
    share = cdiv(sum(v.n * t * b for v, t, b in zip(views, tiles, blocks)), at_once)
    while sum(v.n * t * cdiv(b, share) for v, t, b in zip(views, tiles, blocks)) > at_once:
        share += cdiv(share, 32)
    steps = [cdiv(b, max(1, min(cdiv(b, share), b // STEPS))) for b in blocks]
    return [_Parts(t, cdiv(b, s), s) for t, b, s in zip(tiles, blocks, steps)]


def _layer_options(tile: Tile, aligned: int, shifted: bool) -> dict[str, int]:
    """Single loads, and shifts under TF32, take more registers than the assembler grants of itself."""
    return (tile._replace(registers=224) if aligned == 1 or shifted else tile).options


def _sums(sizes: Sequence[int]) -> list[int]:
    """Where each begins, laid end to end."""
    return list(accumulate(sizes, initial=0))[:-1]


def _coded(numbers: Iterable[int]) -> tuple[int, ...]:
    """Odd and not 1: on ones and multiples of 16 a kernel is specialised, and so compiled anew for every size of
    image."""
    return tuple(2 * number + 3 for number in numbers)


def style_loss_layers(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    scales: Sequence[float],
    shift: float,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """(L, D) of genfast::style_loss_layers."""
    views = [view(f) for f in features]
    if _far_apart(features, views):
        found = [style_loss(f, a, s, shift, k) for f, a, s, k in zip(features, targets, scales, factors)]
        return torch.stack([value for value, _ in found]), torch.cat([difference.flatten() for _, difference in found])
    first = features[0]
    n, layers = len(first), len(views)
    check_samples("style_loss", n)
    how, half, widened = _arithmetic(first, shift)
    tile = _gram_tile(how, half, min(v.c for v in views), False, widened)
    parts = _layer_parts(views, tile)
    counts = [n * p.tiles * p.splits for p in parts]
    at = _sums(counts)
    out = torch.empty(sum(n * v.c * v.c for v in views), dtype=torch.float32, device=first.device)
    part = out.new_empty((sum(counts), tile.channels, tile.channels))
    for last in (False, True):
        chosen = [i for i in range(layers) if (views[i].s_stride != 1) == last]
        if not chosen:
            continue
        mine = [views[i] for i in chosen]
        programs = [parts[i].tiles * parts[i].splits for i in chosen]
        outer = [v.s_stride if last else v.c_stride for v in mine]
        aligned = math.gcd(16, *outer, *(v.n_stride for v in mine), *(v.c if last else v.s for v in mine))
        if any(v.data.data_ptr() % 16 for v in mine):
            aligned = 1
        _gram_layers[(sum(programs), n)](
            tuple(v.data for v in mine),
            *map(
                _coded,
                (
                    _sums(programs),
                    [v.c for v in mine],
                    [v.s for v in mine],
                    [v.n_stride for v in mine],
                    outer,
                    *zip(*(parts[i] for i in chosen)),
                    [at[i] for i in chosen],
                ),
            ),
            part,
            shift,
            LAYERS=len(chosen),
            LAST=last,
            SHIFT=shift != 0,
            ALIGNED=aligned,
            PRECISION=how,
            WIDE=widened or wide(first),
            BY_ITSELF=tile.by_itself,
            BLOCK_C=tile.channels,
            BLOCK_K=tile.depth,
            **_layer_options(tile, aligned, shift != 0),
        )
    together = min(32, triton.next_power_of_2(max(p.splits for p in parts)))
    entries = min(1024, 4096 // together)
    programs = [p.tiles * (tile.channels**2 // entries) for p in parts]
    loss = out.new_zeros((layers, n, max(programs)))
    _join_layers[(sum(programs), n)](
        part,
        tuple(a.float().contiguous() for a in targets),
        out,
        loss,
        *map(
            _coded,
            (
                _sums(programs),
                [v.c for v in views],
                [v.c**2 if len(a) > 1 else 0 for a, v in zip(targets, views)],
                [p.tiles for p in parts],
                [p.splits for p in parts],
                at,
                _sums([n * v.c**2 for v in views]),
            ),
        ),
        tuple(scales),
        tuple(factors),
        loss.shape[2],
        LAYERS=layers,
        BLOCK_C=tile.channels,
        BLOCK_E=entries,
        BLOCK_R=together,
        num_warps=4,
    )
    return loss.sum(2), out


def _times(features: Tensor, matrix: Tensor, by: Tensor | None, scale: float, shift: float) -> Tensor:
    """scale by_n matrix_n (F_n + shift), with a symmetric matrix in float32."""
    out = output(features)
    if not out.numel():
        return out
    if features.dtype is torch.float16:
        top = matrix.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        matrix = matrix / top[:, None, None]
        by = top if by is None else by * top
    if features.dtype is not torch.float32 and not wide(features):
        matrix = matrix.to(features.dtype)
    v, to = view(features), view(out)
    how = precision(features)
    tile = _product_tile(how, features.dtype is not torch.float32, v.c, _odd(v) or _odd(to))
    tile = tile._replace(**TUNABLE["product"].now)
    c_tiles = cdiv(v.c, tile.channels)
    _product[(c_tiles * cdiv(v.s, tile.positions), v.n)](
        matrix.contiguous(),
        v.data,
        matrix if by is None else by.contiguous(),
        out,
        v.c,
        v.s,
        *v.strides,
        *to.strides,
        c_tiles,
        scale,
        shift,
        LAST=v.walks_channels,
        OUT_LAST=to.walks_channels,
        SHIFT=shift != 0,
        BY=by is not None,
        PRECISION=how,
        WIDE=wide(features),
        BLOCK_C=tile.channels,
        BLOCK_P=tile.positions,
        BLOCK_K=tile.depth,
        **tile.options,
    )
    return out


def gram_matrix_backward(features: Tensor, grad: Tensor, scale: float, shift: float) -> Tensor:
    """dF of genfast::gram_matrix_backward."""
    g = grad.float()
    return _times(features, g + g.mT, None, scale, shift)


def style_loss_backward(
    features: Tensor, grad: Tensor, difference: Tensor, scale: float, shift: float, factor: float
) -> Tensor:
    """dF of genfast::style_loss_backward."""
    return _times(features, difference.float(), grad.float(), 4.0 * factor * scale, shift)


def _variants() -> list[Aot]:
    found = []
    rows, last = ("fs", "os"), ("fc", "oc")

    def add(
        label: str, kernel: Any, kind: str, ones: tuple[str, ...] | None, launch: dict[str, int], **base: Any
    ) -> None:
        known = dict.fromkeys(("f", "h"), f"*{kind}") | dict.fromkeys(("scale", "shift"), "fp32")
        known |= dict.fromkeys(("part", "loss", "by", "target"), "*fp32")
        known |= {"out": f"*{kind}" if kernel is _product else "*fp32"}
        types = {name: known[name] for name in kernel.arg_names if name in known}
        base = {name: value for name, value in base.items() if name in kernel.arg_names}
        found.append(variant(f"{label} {kind}", kernel, types, base, ones, **launch))

    for kind in ("fp32", "bf16", "fp16"):
        half = kind != "fp32"
        for how in ("ieee",) if half else ("ieee", "tf32"):
            for form, ones in (("", rows), (" channels_last", last), (" any strides", None)):
                for c in (64, 512):
                    if c == 64 and (how == "ieee" and not half or ones is None) or kind == "fp16" and (form or c == 64):
                        continue
                    base = dict(LAST=ones is last, OUT_LAST=ones is last, SHIFT=False, PRECISION=how, WIDE=False)
                    t = _gram_tile(how, half, c, ones is None, False)
                    for direct in (False, True):
                        label = f"{'entries' if direct else 'part'} {c} {how}{form}"
                        blocks = dict(BLOCK_C=t.channels, BLOCK_K=t.depth, HALVES=t.halves, BY_ITSELF=t.by_itself)
                        add(label, _gram, kind, ones, t.options, DIRECT=direct, **base, **blocks)
                    t = _product_tile(how, half, c, ones is None)
                    blocks = dict(BLOCK_C=t.channels, BLOCK_P=t.positions, BLOCK_K=t.depth, BY=True)
                    add(f"{c} {how}{form}", _product, kind, ones, t.options, **base, **blocks)
        how = "tf32" if half else "ieee"
        t = _gram_tile(how, half, 64, False, half)
        base = dict(
            LAST=False, OUT_LAST=False, SHIFT=True, WIDE=half, DIRECT=False, BLOCK_C=t.channels, BLOCK_K=t.depth
        )
        base |= dict(HALVES=t.halves, BY_ITSELF=t.by_itself)
        add("part, shift", _gram, kind, rows, t.options, PRECISION=how, **base)
        t = _product_tile("ieee", half, 256, False)
        base |= dict(BLOCK_C=t.channels, BLOCK_P=t.positions, BLOCK_K=t.depth, BY=False, WIDE=False)
        add("shift", _product, kind, rows, t.options, PRECISION="ieee", **base)
    for style in (False, True):
        for entries, together in ((1024, 1), (128, 32)):
            for size, halves in ((64, 1), (128, 2)):
                base = dict(STYLE=style, BLOCK_C=size, HALVES=halves, BLOCK_E=entries, BLOCK_R=together)
                add(f"{'style' if style else 'gram'} {size} of {together}", _join, "fp32", (), {"num_warps": 4}, **base)
    return found + _layer_variants()


def _layer_variants() -> list[Aot]:
    """Of five layers, as of VGG."""
    found = []

    def add(label: str, kernel: Any, kind: str, launch: dict[str, int], **base: Any) -> None:
        base["LAYERS"] = 5
        types: dict[str, Any] = dict.fromkeys(kernel.arg_names, ("i32",) * 5) | dict.fromkeys(base, "constexpr")
        types |= {"f": (f"*{kind}",) * 5, "target": ("*fp32",) * 5} | dict.fromkeys(("out", "part", "loss"), "*fp32")
        types |= dict.fromkeys(("scales", "factors"), ("fp32",) * 5) | {"width": "i32", "shift": "fp32"}
        signature = {name: types[name] for name in kernel.arg_names}
        aligned = tuple(name for name in ("out", "part", "loss") if name in signature)
        found.append(Aot(label, kernel, signature, base, launch, aligned))

    for kind, how in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")):
        half = kind != "fp32"
        for form, c, aligned, shifted in (
            ("", 64, 16, False),
            ("", 64, 1, False),
            (" channels_last", 64, 16, False),
            ("", 512, 16, False),
            (" shift", 64, 16, True),
        ):
            if kind == "fp16" and (form or aligned == 1):
                continue
            if c == 512 and _gram_tile(how, half, c, False, False).channels == 64:
                continue
            widened = half and shifted
            t = _gram_tile(how, half, c, False, widened)
            base = dict(
                LAST=form == " channels_last", SHIFT=shifted, ALIGNED=aligned, PRECISION="tf32" if widened else how
            )
            options = _layer_options(t, aligned, shifted)
            blocks = dict(WIDE=widened, BY_ITSELF=t.by_itself, BLOCK_C=t.channels, BLOCK_K=t.depth)
            add(f"layers {c} {how}{form} by {aligned} {kind}", _gram_layers, kind, options, **base, **blocks)
    for c in (64, 128):
        for entries, together in ((1024, 1), (128, 32)):
            base = dict(BLOCK_C=c, BLOCK_E=entries, BLOCK_R=together)
            add(f"layers, {c} by {c} of {together}", _join_layers, "fp32", {"num_warps": 4}, **base)
    return found


AOT = _variants()
