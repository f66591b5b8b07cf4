"""Masked convolution (PixelRNN 1601.06759 sec. 3.4): a convolution that sees only what comes before, as an implicit
product.

    y[p, co] = act(b[co] + sum_{t, ci} w[co, ci, t] x[p + (t - center) dilation, ci]) over the live taps t
    backward  d = dy [y > 0], dx[p, ci] = sum_{t, co} w[co, ci, t] d[p - (t - center) dilation, co],
              dw[co, ci, t] = sum_p d[p, co] x[p + (t - center) dilation, ci], db = sum_p d

x (N, Cin, *S), w (Cout, Cin/groups, *k), b (Cout,), S of one to three axes. A tap is live if t - center is
lexicographically below 0; at 0, pairs of channels are live by their colour. That order is the memory's, so the live
taps are the first T, and no list of them is needed. Dead weights are never multiplied: a small kernel packs the live
ones in the order of the product (zeros for the dead pairs of the centre tap, and around the edges, so that tiles of
weights need no mask), reading w once.

Fused: padding, taps, bias and activation; dx is the same kernel with steps of the other sign. A program takes a tile of
positions of any samples by output channels and runs over (tap, block of input channels) in one loop, or over taps and
channels alike where a group has few channels (a first layer). dw is split over positions into chunks whose number
depends on the shape alone; a second kernel adds their partial sums in order and writes zeros where weights are dead. d
is formed once, with db (3 passes over y), since dx and dw would else gate every element T times. x, y and their
gradients are read and written where they lie, by strides; only dw may transpose its operands first (float32 on FMA
units, and wide layers of half type in NCHW). Half types add in float32; float32 follows
torch.backends.cuda.matmul.allow_tf32.

2 T Cin/groups FLOPs an output element, in each of y, dx and dw; x is read from memory once and y written once (the taps
read x from L2), plus the weights. 5x5 of type B at 128 channels: 425 984 FLOPs and 512 bytes a position in bfloat16,
832 FLOPs a byte where an H200's tensor cores balance at 206; 416 in float32 where its FMA units balance at 14. So bound
by FLOPs down to about 32 channels in half types and 5 in float32; a first layer of half type (3 channels, 7x7: 70 FLOPs
a byte) by memory.

Predicted for an H200, not yet run on a GPU. Counted in what the compiler makes for sm_90 at 128 channels: the float32
loop is 81% FMA instructions at 16 warps a multiprocessor, so 65 to 75% of the FMA peak. The bfloat16 loop in
channels_last takes 338 issue slots while its products (wgmma) take 512 cycles of the tensor cores, with 16-byte loads
two steps ahead; a tile of 128 x 128 asks L2 for 64 bytes a cycle at their full rate, of about 39 that a multiprocessor
gets, so 50 to 60% of it (256 x 128: 48 bytes); in NCHW a shifted row has no alignment, so half types load 2 bytes a
thread and not ahead: 30 to 45%, and channels_last is the form for them. A dense convolution of the masked weight
    multiplies k^2 taps for (k^2 + 1) / 2: 1.8, 1.92 and 1.96 times
the FLOPs for 3x3, 5x5 and 7x7; cropped to the rows down to the centre's it is 1.2, 1.15 and 1.12 times. With cuDNN at
70 to 80%
of either peak: in float32 1.5 to 1.8 times as fast as dense and on a par with cropped; in bfloat16 1.2 to 1.5 times and
    0.75 to
0.95, plus the passes saved by fusing padding, mask, bias and activation, which weigh the more the fewer the channels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    MULTIPROCESSORS,
    Aot,
    by_rule,
    cdiv,
    options,
    output,
    precision,
    tile,
    tile_options,
    variant,
    view,
    wide,
)

# Each of the tile's fields that another than the rule's is tried of.
_TILES = [
    dict(rows=r, columns=c, depth=d, warps=w, stages=s, registers=0)
    for r, c, d, w, s in (
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 64, 64, 4, 3),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (256, 64, 64, 8, 3),
        (64, 64, 64, 4, 4),
        (128, 128, 32, 8, 4),
        (256, 128, 32, 8, 4),
    )
]
TUNABLE = {"product": by_rule(*_TILES), "weight_grad": by_rule(*_TILES)}
PACKED_BELOW = 9  # channels up to which a step of the product runs over taps and channels alike
TRANSPOSE_FROM = (
    1024  # taps times channels from which the weight gradient of half types in NCHW repays two transposing copies
)
ROWS = 1024  # programs a channel tile of the gradient through the activation, as in actnorm.py


class Taps(NamedTuple):
    """The live taps of a kernel: the first ``live`` in memory order, since that order is the lexicographic one."""

    sizes: tuple[int, int, int]
    center: tuple[int, int, int]
    dilation: tuple[int, int, int]
    axes: int
    live: int
    masked: int  # the tap whose channel pairs are masked, or -1

    @property
    def all(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]


@functools.cache
def taps(
    sizes: tuple[int, ...], center: tuple[int, ...], dilation: tuple[int, ...], mask_type: str, colours: int
) -> Taps:
    """Of a kernel of these sizes; every center is allowed, also one beside the kernel."""
    before, rest = 0, 1
    for size in sizes:
        rest *= size
    there = True
    for size, c in zip(sizes, center):
        rest //= size
        before += min(max(c, 0), size) * rest
        if not 0 <= c < size:
            there = False
            break
    there = there and (mask_type == "B" or colours > 1)
    axes = len(sizes)
    wide_sizes, wide_center, wide_dilation = (
        (fill,) * (3 - axes) + tuple(given) for fill, given in ((1, sizes), (0, center), (1, dilation))
    )
    return Taps(wide_sizes, wide_center, wide_dilation, axes, before + there, before if there and colours > 1 else -1)


class Colours(NamedTuple):
    """Which channel pairs the centre tap may join."""

    count: int
    blocked: bool
    strict: bool  # mask type A


# ---- kernels ----


@triton.jit
def _colour(c, C, COLOURS: tl.constexpr, BLOCKED: tl.constexpr):
    if BLOCKED:
        return c * COLOURS // C
    else:
        return c % COLOURS


@triton.jit
def _pack(
    weight,
    packed,
    w_group,
    wa,
    wb,
    wt,
    wr,
    wc,
    A,
    B,
    rows,
    columns,
    depth,
    live,
    masked,
    groups,
    c_tiles,
    COLOURS: tl.constexpr,
    BLOCKED: tl.constexpr,
    STRICT: tl.constexpr,
    MIRRORED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows (tap, channel a), columns channel b of each group: live weights in the order of the product, zeros around
    them.

    a are input channels and b output channels; ``MIRRORED``, for the gradient of the input, the other way round.
    """
    group = tl.program_id(1)
    row = ((tl.program_id(0) // c_tiles) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    b = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    t = row // depth
    a = row % depth
    there = (t < live) & (a < A) & (b < B)
    if COLOURS > 1:
        of_a = _colour(group * A + a, A * groups, COLOURS, BLOCKED)
        of_b = _colour(group * B + b, B * groups, COLOURS, BLOCKED)
        if MIRRORED:
            may = of_b < of_a if STRICT else of_b <= of_a
        else:
            may = of_a < of_b if STRICT else of_a <= of_b
        there = there & ((t != masked) | may)
    value = tl.load(weight + (group * w_group + a * wa + b * wb + t * wt), mask=there, other=0)
    at = packed + group.to(tl.int64) * rows * columns + (row * wr + b * wc)
    tl.store(at, value.to(packed.dtype.element_ty), mask=(row < rows) & (b < columns))


@triton.jit
def _offsets(t, cz, cy, cx, lz, ly, lx, KH: tl.constexpr, KW: tl.constexpr):
    """Where tap t lies, in positions along each axis."""
    return (t // (KH * KW) - cz) * lz, (t // KW % KH - cy) * ly, (t % KW - cx) * lx


@triton.jit
def _inside(z, y, x, oz, oy, ox, D, H, W, AXES: tl.constexpr):
    """Whether the neighbour at that offset is in the image."""
    found = (x + ox >= 0) & (x + ox < W)
    if AXES > 1:
        found = found & (y + oy >= 0) & (y + oy < H)
    if AXES > 2:
        found = found & (z + oz >= 0) & (z + oz < D)
    return found


@triton.jit
def _conv(
    x,
    weight,
    bias,
    y,
    xn,
    xc,
    xz,
    xy,
    xx,
    yn,
    yc,
    yz,
    yy,
    yx,
    wr,
    wc,
    P,
    D,
    H,
    W,
    CO,
    rows,
    columns,
    last,
    cz,
    cy,
    cx,
    lz,
    ly,
    lx,
    o_tiles,
    steps,
    CI: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    AXES: tl.constexpr,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of positions by output channels of one group; ``last`` live rows, dilations l. negative for the
    transpose."""
    group = tl.program_id(1)
    o = (tl.program_id(0) % o_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    p_tile = tl.program_id(0) // o_tiles
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_K)
    if FAR:
        p_tile = p_tile.to(tl.int64)
        group = group.to(tl.int64)
        o = o.to(tl.int64)
        k = k.to(tl.int64)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = p // (D * H * W)
    s = p % (D * H * W)
    px = s % W
    py = s // W % H
    pz = s // W // H
    source = x + group * CI * xc + (n * xn + pz * xz + py * xy + px * xx)
    there = p < P
    if X_LAST:
        source, there, tx, ty, tz, k = (
            source[:, None],
            there[:, None],
            px[:, None],
            py[:, None],
            pz[:, None],
            k[None, :],
        )
    else:
        source, there, tx, ty, tz, k = (
            source[None, :],
            there[None, :],
            px[None, :],
            py[None, :],
            pz[None, :],
            k[:, None],
        )
    weights = weight + group.to(tl.int64) * rows * columns + (r[:, None] * wr + o[None, :] * wc)
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    DEPTH: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    for i in range(steps):
        if PACKED:
            row = i * BLOCK_K + k
            t = row // CI
            c = row % CI
            inside = there & (row < last)
        else:
            t = i // DEPTH
            if FAR:
                t += tl.zeros((1, 1), dtype=tl.int64)
            c = (i % DEPTH) * BLOCK_K + k
            inside = there
            if CI % BLOCK_K:
                inside = inside & (c < CI)
        oz, oy, ox = _offsets(t, cz, cy, cx, lz, ly, lx, KH, KW)
        inside = inside & _inside(tz, ty, tx, oz, oy, ox, D, H, W, AXES)
        value = tl.load(source + (c * xc + (oz * xz + oy * xy + ox * xx)), mask=inside, other=0)
        w = tl.load(weights + i * BLOCK_K * wr)
        if WIDE:
            value = value.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(value if X_LAST else tl.trans(value), w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + group * CO + o, mask=o < CO, other=0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN
    out = total.to(y.dtype.element_ty)
    target = y + group * CO * yc + (n * yn + pz * yz + py * yy + px * yx)
    if Y_LAST:
        tl.store(target[:, None] + (o * yc)[None, :], out, mask=(p < P)[:, None] & (o < CO)[None, :])
    else:
        tl.store(target[None, :] + (o * yc)[:, None], tl.trans(out), mask=(p < P)[None, :] & (o < CO)[:, None])


@triton.jit
def _gate(
    grad_y,
    y,
    d,
    partial,
    gn,
    gc,
    gs,
    yn,
    yc,
    ys,
    dn,
    dc,
    ds,
    C,
    S,
    s_tiles,
    tiles,
    c_tiles,
    rows,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """d = grad_y (y > 0), and sum d for each channel over the tiles row, row + rows, ..."""
    row = tl.program_id(0) // c_tiles
    c = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    if FAR:
        c = c.to(tl.int64)
    total = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for k in range(row, tiles, rows):
        n = (k // s_tiles).to(tl.int64)
        p = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
        if FAR:
            p = p.to(tl.int64)
        inside = (c < C) & (p < S)
        g = tl.load(grad_y + n * gn + (c * gc + p * gs), mask=inside, other=0)
        out = tl.load(y + n * yn + (c * yc + p * ys), mask=inside, other=0)
        g = tl.where(out > 0, g, 0.0).to(d.dtype.element_ty)
        tl.store(d + n * dn + (c * dc + p * ds), g, mask=inside)
        total += g.to(tl.float32)
    tl.store(partial + row.to(tl.int64) * C + c, tl.sum(total, axis=1)[:, None], mask=c < C)


@triton.jit
def _divide(p, magic, shift):
    """p // d for 0 <= p < 2^31, by _magic(d): three instructions where a division takes twenty."""
    p = p.to(tl.uint32)
    return ((tl.umulhi(p, magic.to(tl.uint32, bitcast=True)) + p) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _place(p, D, H, W, s_magic, s_shift, h_magic, h_shift, w_magic, w_shift, AXES: tl.constexpr, FAR: tl.constexpr):
    """Sample and coordinates of position p of the batch."""
    if FAR:
        n = p // (D * H * W)
        s = p % (D * H * W)
        x = s % W
        y = s // W % H
        z = s // W // H
    else:
        n = _divide(p, s_magic, s_shift)
        x = p - n * (D * H * W)
        y = tl.zeros_like(x)
        z = tl.zeros_like(x)
        if AXES > 1:
            y = _divide(x, w_magic, w_shift)
            x -= y * W
        if AXES > 2:
            z = _divide(y, h_magic, h_shift)
            y -= z * H
    return n, z, y, x


@triton.jit(do_not_specialize=["s_magic", "s_shift", "h_magic", "h_shift", "w_magic", "w_shift"])
def _weight_grad(
    d,
    x,
    partial,
    dn,
    dc,
    dz,
    dy,
    dx,
    xn,
    xc,
    xz,
    xy,
    xx,
    P,
    D,
    H,
    W,
    CO,
    size,
    s_magic,
    s_shift,
    h_magic,
    h_shift,
    w_magic,
    w_shift,
    cz,
    cy,
    cx,
    lz,
    ly,
    lx,
    o_tiles,
    p_tiles,
    chunk_tiles,
    live,
    groups,
    CI: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    AXES: tl.constexpr,
    PACKED: tl.constexpr,
    D_LAST: tl.constexpr,
    X_LAST: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """sum over a chunk of positions of d[p, o] x[p + offset of t, i]: a tile of o by i or, ``PACKED``, by (t, i).

    ``DENSE``: the positions of the whole batch lie evenly in both, as in channels_last.
    """
    group = tl.program_id(2)
    o_at = (tl.program_id(0) % o_tiles) * BLOCK_O
    column = tl.program_id(0) // o_tiles
    DEPTH: tl.constexpr = (CI + BLOCK_I - 1) // BLOCK_I
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    q = tl.arange(0, BLOCK_P)
    if FAR:
        group = group.to(tl.int64)
        o = o.to(tl.int64)
        i = i.to(tl.int64)
        q = q.to(tl.int64)
    o_d, q_d = (o[None, :] + o_at, q[:, None]) if D_LAST else (o[:, None] + o_at, q[None, :])
    i_x, q_x = (i[None, :], q[:, None]) if X_LAST else (i[:, None], q[None, :])
    if PACKED:
        i_x += column * BLOCK_I
        t = i_x // CI
        c = i_x % CI
        known = t < live
    else:
        t = column // DEPTH
        if FAR:
            t += tl.zeros((1, 1), dtype=tl.int64)
        c = (column % DEPTH) * BLOCK_I + i_x
        known = c < CI
    oz, oy, ox = _offsets(t, cz, cy, cx, lz, ly, lx, KH, KW)
    by_d = d + group * CO * dc + o_d * dc
    by_x = x + group * CI * xc + (c * xc + (oz * xz + oy * xy + ox * xx))
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    first = tl.program_id(1) * chunk_tiles
    for k in range(first, tl.minimum(first + chunk_tiles, p_tiles)):
        p = k * BLOCK_P + q_d
        pn, pz, py, px = _place(p, D, H, W, s_magic, s_shift, h_magic, h_shift, w_magic, w_shift, AXES, FAR)
        at = p * dx if DENSE else pn * dn + pz * dz + py * dy + px * dx
        g = tl.load(by_d + at, mask=(p < P) & (o_d < CO), other=0)
        p = k * BLOCK_P + q_x
        pn, pz, py, px = _place(p, D, H, W, s_magic, s_shift, h_magic, h_shift, w_magic, w_shift, AXES, FAR)
        inside = known & (p < P) & _inside(pz, py, px, oz, oy, ox, D, H, W, AXES)
        at = p * xx if DENSE else pn * xn + pz * xz + py * xy + px * xx
        value = tl.load(by_x + at, mask=inside, other=0)
        if WIDE:
            g = g.to(tl.float32)
            value = value.to(tl.float32)
        total = tl.dot(
            tl.trans(g) if D_LAST else g, value if X_LAST else tl.trans(value), total, input_precision=PRECISION
        )
    row = (group * CO + o_at + o)[:, None]
    if PACKED:
        i += column * BLOCK_I
        at = (i // CI * groups * CO + row) * CI + i % CI
        known = i // CI < live
    else:
        i += (column % DEPTH) * BLOCK_I
        at = (column // DEPTH * groups * CO + row) * CI + i
        known = i < CI
    tl.store(partial + tl.program_id(1).to(tl.int64) * size + at, total, mask=known[None, :] & (o_at + o < CO)[:, None])


@triton.jit
def _finish(
    partial,
    dweight,
    size,
    pairs,
    CI,
    CO,
    all_taps,
    live,
    masked,
    chunks,
    groups,
    COLOURS: tl.constexpr,
    BLOCKED: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds the partial sums (tap, output, input channel) in order; zero where the weight is dead."""
    t = tl.program_id(0) % all_taps
    e = (tl.program_id(0) // all_taps) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    if t < live:
        for start in range(0, chunks, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            inside = (r < chunks)[:, None] & (e < pairs)[None, :]
            at = partial + (r.to(tl.int64) * size)[:, None] + (t * pairs + e)[None, :]
            total += tl.sum(tl.load(at, mask=inside, other=0), axis=0)
        if COLOURS > 1:
            o = e // CI
            of_o = _colour(o, CO * groups, COLOURS, BLOCKED)
            of_i = _colour(o // CO * CI + e % CI, CI * groups, COLOURS, BLOCKED)
            may = of_i < of_o if STRICT else of_i <= of_o
            total = tl.where((t != masked) | may, total, 0.0)
    tl.store(dweight + (e * all_taps + t), total.to(dweight.dtype.element_ty), mask=e < pairs)


# ---- launches ----


class Image(NamedTuple):
    """A tensor as (N, C, D, H, W), with its strides in elements."""

    data: Tensor
    shape: tuple[int, int, int]
    strides: tuple[int, int, int, int, int]
    last: bool  # whether neighbouring threads should walk along channels
    far: bool  # whether an offset needs 64 bits

    @property
    def dense(self) -> bool:
        """Whether the positions of the whole batch are one axis with one step."""
        step = self.strides[4]
        n, _, *inner = self.strides
        for size, stride in zip((*reversed(self.shape), self.data.shape[0]), (*reversed(inner), n)):
            if size > 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def positions(self) -> int:
        return self.data.shape[0] * self.shape[0] * self.shape[1] * self.shape[2]


def image(x: Tensor) -> Image:
    missing = 5 - x.dim()
    shape = (1,) * missing + tuple(x.shape[2:])
    strides = (*x.stride()[:2], *(0,) * missing, *x.stride()[2:])
    reach = sum(size * stride for size, stride in zip((*x.shape[:2], *shape), strides))
    far = reach >= 2**31 or x.shape[0] * shape[0] * shape[1] * shape[2] >= 2**31 - 256
    steps = [stride for size, stride in zip((x.shape[0], *shape), (strides[0], *strides[2:])) if size > 1]
    return Image(x, shape, strides, x.shape[1] > 1 and bool(steps) and x.stride(1) < steps[-1], far)


def _channels_last(x: Image) -> Image:
    """The same values with their channels together; copied if they are not."""
    if x.last or x.data.shape[1] == 1:
        return x
    return image(x.data.movedim(1, -1).contiguous().movedim(-1, 1))


class Tile(NamedTuple):
    """Positions, output channels and depth of a step of ``_conv``; output, input channels and positions of
    ``_weight_grad``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0  # at most, where the assembler's own choice spills

    @property
    def options(self) -> dict[str, int]:
        return tile_options(self.warps, self.stages, self.registers)


def _covering(size: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that wastes least on ``size``; what a narrow tile reads again counts
    too."""
    blocks = [b for b in (128, 64, 32, 16) if b <= largest]
    return min(blocks, key=lambda b: cdiv(size, b) * b * (1 + 16 / b))


def _tile(how: str, half: bool, far: bool, last: bool, positions: int, columns: int, depth: int, groups: int) -> Tile:
    """Of ``_conv``; ``last``: x lies in channels_last, ``depth``: input channels of a group."""
    if far:
        return Tile(64, _covering(columns, 64), 16, 8, 2)
    exact, packed = how == "ieee" and not half, depth < PACKED_BELOW
    block = _covering(columns, 64 if exact else 128)
    tall = cdiv(positions, 128) * cdiv(columns, block) * groups >= MULTIPROCESSORS
    if exact and tall and not packed:
        return Tile(128, block, 16, 8, 2, 128) if last else Tile(128, block, 16, 4, 2)
    if exact:
        return Tile(64, block, 16, 4, 2)
    deep = _covering(depth, 64) if half and not packed else 32
    return Tile(128 if tall else 64, block, deep, 8 if packed or (tall and block == 128) else 4, 3)


def _grad_tile(how: str, half: bool, far: bool, last: bool, rows: int, columns: int, packed: bool) -> Tile:
    """Of ``_weight_grad``; ``last``: d lies in channels_last."""
    if far:
        return Tile(_covering(rows, 64), _covering(columns, 64), 16, 8, 2, 224)
    if how == "ieee" and not half:
        if packed:
            return Tile(_covering(rows, 64), _covering(columns, 64), 16, 8, 2, 224)
        return Tile(_covering(rows, 128 if last else 64), _covering(columns, 64), 16, 4, 2)
    o, i = _covering(rows, 128), _covering(columns, 64 if packed else 128)
    return Tile(o, i, 64 if half else 32, 8 if packed or o * i == 128 * 128 else 4, 3)


def _magic(d: int) -> tuple[int, int]:
    """Multiplier (as a signed 32-bit integer) and shift of ``_divide``, after Granlund and Montgomery (1994)."""
    shift = (d - 1).bit_length()
    magic = (2**32 * (2**shift - d)) // d + 1
    return magic - 2**32 if magic >= 2**31 else magic, shift


def _packed(
    weight: Tensor,
    dtype: torch.dtype,
    how: str,
    groups: int,
    found: Taps,
    colours: Colours,
    mirrored: bool,
    columns: int,
    depth: int,
    rows: int,
) -> Tensor:
    """Live weights as (group, row, column); for TF32, whose tensor cores take nothing else, rows lie together."""
    flat = weight.flatten(2)
    out, inner = weight.shape[0] // groups, weight.shape[1]
    shape = (groups, columns, rows) if how == "tf32" else (groups, rows, columns)
    packed = torch.empty(shape, dtype=dtype, device=weight.device)
    if how == "tf32":
        packed = packed.transpose(1, 2)
    wo, wi, wt = flat.stride()
    a, b = ((out, wo), (inner, wi)) if mirrored else ((inner, wi), (out, wo))
    c_tiles = cdiv(columns, 64)
    if rows:
        _pack[(cdiv(rows, 16) * c_tiles, groups)](
            flat,
            packed,
            out * wo,
            a[1],
            b[1],
            wt,
            packed.stride(1),
            packed.stride(2),
            a[0],
            b[0],
            rows,
            columns,
            depth,
            found.live,
            found.masked,
            groups,
            c_tiles,
            COLOURS=colours.count,
            BLOCKED=colours.blocked,
            STRICT=colours.strict,
            MIRRORED=mirrored,
            BLOCK_R=16,
            BLOCK_C=64,
        )
    return packed


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    groups: int,
    found: Taps,
    colours: Colours,
    relu: bool,
    mirrored: bool,
) -> None:
    """The convolution of x with the live taps into y; ``mirrored``, its transpose."""
    source, target = image(x), image(y)
    inner, outer = x.shape[1] // groups, y.shape[1] // groups
    how = precision(x)
    far = source.far or target.far
    t = _tile(how, x.dtype is not torch.float32, far, source.last, target.positions, outer, inner, groups)
    t = t._replace(**TUNABLE["product"].now)
    packed = inner < PACKED_BELOW
    depth = inner if packed else cdiv(inner, t.depth) * t.depth
    rows = cdiv(found.live * depth, t.depth) * t.depth
    o_tiles = cdiv(outer, t.columns)
    weights = _packed(weight, x.dtype, how, groups, found, colours, mirrored, o_tiles * t.columns, depth, rows)
    dilation = tuple(-step for step in found.dilation) if mirrored else found.dilation
    _conv[(cdiv(target.positions, t.rows) * o_tiles, groups)](
        x,
        weights,
        weights if bias is None else bias.contiguous(),
        y,
        *source.strides,
        *target.strides,
        *weights.stride()[1:],
        target.positions,
        *target.shape,
        outer,
        rows,
        o_tiles * t.columns,
        found.live * inner,
        *found.center,
        *dilation,
        o_tiles,
        rows // t.depth,
        CI=inner,
        KH=found.sizes[1],
        KW=found.sizes[2],
        AXES=found.axes,
        PACKED=packed,
        BIAS=bias is not None,
        RELU=relu,
        X_LAST=source.last,
        Y_LAST=target.last,
        PRECISION=how,
        WIDE=wide(x),
        FAR=far,
        BLOCK_P=t.rows,
        BLOCK_O=t.columns,
        BLOCK_K=t.depth,
        **t.options,
    )


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: list[int],
    groups: int,
    center: list[int],
    activation: str,
) -> Tensor:
    """y of genfast::masked_conv."""
    y = output(x, weight.shape[0])
    if y.numel():
        found = taps(tuple(weight.shape[2:]), tuple(center), tuple(dilation), mask_type, data_channels)
        colours = Colours(data_channels, group_order == "blocked", mask_type == "A")
        _launch(x, weight, bias, y, groups, found, colours, activation == "relu", False)
    return y


def _through(grad_y: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """grad_y (y > 0) and its sum for each channel."""
    d = output(y)
    a, g, out = view(y), view(grad_y), view(d)
    block_c, block_s = tile(a)
    c_tiles, s_tiles = cdiv(a.c, block_c), cdiv(a.s, block_s)
    rows = min(a.n * s_tiles, ROWS)
    far = a.far or out.far or g.far
    partial = torch.empty((rows, a.c), dtype=torch.float32, device=y.device)
    _gate[(rows * c_tiles,)](
        g.data,
        a.data,
        d,
        partial,
        *g.strides,
        *a.strides,
        *out.strides,
        a.c,
        a.s,
        s_tiles,
        a.n * s_tiles,
        c_tiles,
        rows,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far),
    )
    return d, partial.sum(0)


def _launch_weight_grad(d: Tensor, x: Tensor, dweight: Tensor, groups: int, found: Taps, colours: Colours) -> None:
    inner, outer = dweight.shape[1], dweight.shape[0] // groups
    how, half = precision(x), x.dtype is not torch.float32
    grad, source = image(d), image(x)
    # FMA units read both operands from shared memory, where channels that do not lie together meet in one bank.
    if (how == "ieee" and not half) or (half and found.live * inner >= TRANSPOSE_FROM):
        source = _channels_last(source)
    if half and found.live * inner >= TRANSPOSE_FROM:
        grad = _channels_last(grad)
    packed = inner < PACKED_BELOW
    far = grad.far or source.far
    t = _grad_tile(
        how,
        x.dtype is not torch.float32,
        far,
        grad.last and source.last,
        outer,
        found.live * inner if packed else inner,
        packed,
    )._replace(**TUNABLE["weight_grad"].now)
    o_tiles, p_tiles = cdiv(outer, t.rows), cdiv(source.positions, t.depth)
    tiles = o_tiles * (cdiv(found.live * inner, t.columns) if packed else found.live * cdiv(inner, t.columns))
    size = found.live * dweight.shape[0] * inner
    # As many programs as run at once, at 16 warps a multiprocessor, and none of fewer than 8 steps.
    at_once = MULTIPROCESSORS * 16 // t.warps
    chunk_tiles = max(8, cdiv(p_tiles, max(1, at_once // max(1, tiles * groups))))
    chunks = cdiv(p_tiles, chunk_tiles)
    partial = torch.empty((chunks, size), dtype=torch.float32, device=x.device)
    depth, height, width = source.shape
    if tiles:
        _weight_grad[(tiles, chunks, groups)](
            grad.data,
            source.data,
            partial,
            *grad.strides,
            *source.strides,
            source.positions,
            *source.shape,
            outer,
            size,
            *_magic(depth * height * width),
            *_magic(height),
            *_magic(width),
            *found.center,
            *found.dilation,
            o_tiles,
            p_tiles,
            chunk_tiles,
            found.live,
            groups,
            CI=inner,
            KH=found.sizes[1],
            KW=found.sizes[2],
            AXES=found.axes,
            PACKED=packed,
            D_LAST=grad.last,
            X_LAST=source.last,
            DENSE=grad.dense and source.dense,
            PRECISION=how,
            WIDE=wide(x),
            FAR=far,
            BLOCK_O=t.rows,
            BLOCK_I=t.columns,
            BLOCK_P=t.depth,
            **t.options,
        )
    pairs = dweight.shape[0] * inner
    _finish[(cdiv(pairs, 128) * found.all,)](
        partial,
        dweight,
        size,
        pairs,
        inner,
        outer,
        found.all,
        found.live,
        found.masked,
        chunks,
        groups,
        COLOURS=colours.count,
        BLOCKED=colours.blocked,
        STRICT=colours.strict,
        BLOCK_E=128,
        BLOCK_R=8,
    )


def masked_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: list[int],
    groups: int,
    center: list[int],
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of genfast::masked_conv_backward; an empty tensor for each that is not wanted."""
    dx = output(x) if wanted[0] else x.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else weight.new_empty(0)
    dbias = weight.new_empty(weight.shape[0] if wanted[2] else 0)
    if not y.numel() or not x.numel():
        return dx.zero_(), dweight.zero_(), dbias.zero_()
    found = taps(tuple(weight.shape[2:]), tuple(center), tuple(dilation), mask_type, data_channels)
    colours = Colours(data_channels, group_order == "blocked", mask_type == "A")
    if activation == "relu":
        d, total = _through(grad_y, y)
    else:
        d = grad_y.to(x.dtype)
    if wanted[0]:
        _launch(d, weight, None, dx, groups, found, colours, False, True)
    if wanted[1]:
        _launch_weight_grad(d, x, dweight, groups, found, colours)
    if wanted[2]:
        dbias.copy_(total if activation == "relu" else d.sum((0, *range(2, d.dim())), dtype=torch.float32))
    return dx, dweight, dbias


def _variants() -> list[Aot]:
    found = []
    rows, last = ("xx", "yx", "dx", "lz", "ly", "lx"), ("xc", "yc", "dc", "lz", "ly", "lx")

    def add(
        label: str, kernel: Any, kind: str, ones: tuple[str, ...] | None, launch: dict[str, int], **base: Any
    ) -> None:
        pointers = dict.fromkeys(("x", "y", "d", "weight", "bias", "grad_y", "packed", "dweight"), f"*{kind}")
        pointers |= {"partial": "*fp32"}
        types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
        base = {name: value for name, value in base.items() if name in kernel.arg_names}
        found.append(variant(label, kernel, types, base, ones, **launch))

    for kind in ("fp32", "bf16", "fp16"):
        half = kind != "fp32"
        for how in ("ieee",) if half else ("ieee", "tf32"):
            for channels in (3, 64, 128):
                for form, ones in (("", rows), (" channels_last", last), (" any strides", None)):
                    if kind == "fp16" and (form or channels == 64) or ones is None and channels == 64:
                        continue
                    far, is_last, packed = ones is None, ones is last, channels < PACKED_BELOW
                    base = dict(
                        CI=channels,
                        KH=5,
                        KW=5,
                        AXES=2,
                        PACKED=packed,
                        X_LAST=is_last,
                        Y_LAST=is_last,
                        D_LAST=is_last,
                        DENSE=is_last,
                        PRECISION=how,
                        WIDE=False,
                        FAR=far,
                    )
                    label = f"{channels} channels {kind} {how}{form}"
                    forward, transpose = dict(BIAS=True, RELU=True), dict(BIAS=False, RELU=False)
                    for name, positions, ends in (
                        ("", 2**16, forward),
                        (" small", 2**12, forward),
                        (" dx", 2**16, transpose),
                    ):
                        if name and (channels < 128 or far):
                            continue
                        t = _tile(how, half, far, is_last, positions, max(channels, 64), channels, 1)
                        blocks = dict(BLOCK_P=t.rows, BLOCK_O=t.columns, BLOCK_K=t.depth)
                        those = None if ones is None else (*ones, "wr" if how == "tf32" else "wc")
                        add(label + name, _conv, kind, those, t.options, **base, **ends, **blocks)
                    if how == "ieee" and not half:
                        base["X_LAST"], ones = True, ones and (*(name for name in ones if name != "xx"), "xc")
                    t = _grad_tile(
                        how, half, far, is_last, max(channels, 64), 13 * channels if packed else channels, packed
                    )
                    blocks = dict(BLOCK_O=t.rows, BLOCK_I=t.columns, BLOCK_P=t.depth)
                    add(label, _weight_grad, kind, ones, t.options, **base, **blocks)
        base = dict(COLOURS=3, BLOCKED=False, STRICT=True, MIRRORED=False, BLOCK_R=16, BLOCK_C=64, BLOCK_E=128)
        add(f"weights {kind}", _pack, kind, ("wc",), {}, **base)
        add(f"weights {kind}, transposed", _pack, kind, ("wc",), {}, **(base | dict(MIRRORED=True, BLOCKED=True)))
        add(f"sums to {kind}", _finish, kind, (), {}, **(base | dict(BLOCK_R=8)))
        for form, ones in (("", ("gs", "ys", "ds")), (" channels_last", ("gc", "yc", "dc")), (" any strides", None)):
            blocks = dict(BLOCK_C=16, BLOCK_S=64) if form else dict(BLOCK_C=1, BLOCK_S=1024)
            add(f"{kind}{form}", _gate, kind, ones, options(1024, ones is None), FAR=ones is None, **blocks)
    return found


AOT = _variants()
