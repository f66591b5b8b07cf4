"""A linear layer whose mask is a staircase after sorting (MADE, arXiv:1502.03509, section 4), over its live weights
only.

    y[n, rows[r]] = act(b[rows[r]] + sum_{k < counts[r]} x[n, columns[k]] w[rows[r], columns[k]])
    backward  d = dy [y > 0], dx[n, columns[k]] = sum_{r: counts[r] > k} d[n, rows[r]] w[rows[r], columns[k]],
              dw[rows[r], columns[k]] = sum_n d[n, rows[r]] x[n, columns[k]] where k < counts[r], else 0, db = sum_n d

x (N, I), w (O, I), y (N, O); counts is nondecreasing. Fused: mask, bias, activation, the permutations of y, dx, dw and
db.

A small kernel packs w in sorted order with zeros for dead weights, so that no product needs a mask; x is gathered
first, by one pass, only where its columns are not sorted already. Then a tile of sorted outputs ends its sum at its own
largest count, which is its last row's, and a tile of dx begins at the first output that sees it. dw takes tiles that
have a live weight alone, split over samples into chunks whose number depends on the shape alone; a second kernel adds
their partial sums in order, puts them back in the user's order and writes zeros where weights are dead. d is formed
once, in sorted order, with db. Among the tiles of the same samples those of longer sums start first. Half types add in
float32; float32 follows torch.backends.cuda.matmul.allow_tf32.

About N I O FLOPs in each of y, dx and dw, half of the dense product's, times 1 + BLOCK_O / O for tiles on the
staircase. x is read once for a column of tiles (from L2 but for the first), y written once. Of 512 by 512 units that is
64 FLOPs a byte in float32 and 128 in half types, where an H200's FMA units balance at 14 and its tensor cores at 206:
bound by FLOPs in float32, by memory in half types, and in batches of a few hundred by launches and by the longest sum:
tiles shrink until each multiprocessor has one.
Estimates, not measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ._common import MULTIPROCESSORS, Aot, by_rule, cdiv, precision, tile_options, variant, wide

# Each of the tile's fields that another than the rule's is tried of.
_TILES = [
    dict(rows=r, columns=c, depth=d, warps=w, stages=s, registers=0)
    for r, c, d, w, s in (
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (32, 64, 64, 4, 4),
        (32, 32, 64, 2, 4),
    )
]
TUNABLE = {"product": by_rule(*_TILES), "weight_grad": by_rule(*_TILES)}
ROWS = 1024  # programs a column of tiles of the gradient through the activation, as in masked_conv.py

# ---- kernels ----


@triton.jit
def _pack(
    weight,
    packed,
    rows,
    columns,
    counts,
    wo,
    wi,
    pr,
    pc,
    CO,
    CI,
    all_rows,
    all_columns,
    c_tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The weights in sorted order, zeros where they are dead and around them."""
    r = ((tl.program_id(0) // c_tiles) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    k = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    row = tl.load(rows + r, mask=r < CO, other=0)
    live = (r < CO) & (k < tl.load(counts + r, mask=r < CO, other=0))
    column = tl.load(columns + k, mask=k < CI, other=0)
    value = tl.load(weight + (row * wo + column * wi), mask=live, other=0)
    tl.store(
        packed + (r.to(tl.int64) * pr + k * pc),
        value.to(packed.dtype.element_ty),
        mask=(r < all_rows) & (k < all_columns),
    )


@triton.jit
def _blind(counts, CO, k, BLOCK: tl.constexpr):
    """How many outputs do not see the sorted input k."""
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, CO, BLOCK):
        r = start + tl.arange(0, BLOCK)
        found += ((r < CO) & (tl.load(counts + r, mask=r < CO, other=0) <= k)).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _product(
    a,
    b,
    bias,
    y,
    order,
    counts,
    an,
    ac,
    br,
    bc,
    yn,
    N,
    CO,
    depth,
    width,
    tiles,
    TRANSPOSED: tl.constexpr,
    SORTED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of act(a b + bias), a (N, depth), b (depth, width) packed; ``order`` says where a column of it belongs.

    b's live part of a column ends at its count or, ``TRANSPOSED``, begins at the first row that sees it.
    """
    t = tl.program_id(0) % tiles
    if TRANSPOSED:
        first = _blind(counts, CO, t * BLOCK_O, 1024) // BLOCK_K
        steps = tl.cdiv(depth, BLOCK_K) - first
    else:
        t = tiles - 1 - t
        first = 0
        steps = tl.cdiv(tl.load(counts + tl.minimum((t + 1) * BLOCK_O, CO) - 1).to(tl.int32), BLOCK_K)
    o = t * BLOCK_O + tl.arange(0, BLOCK_O)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    if FAR:
        n = n.to(tl.int64)
    there = (n < N)[:, None]
    source = a + (n[:, None] * an + k[None, :] * ac)
    weights = b + (k[:, None] * br + o[None, :] * bc)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for i in range(steps):
        if EVEN:
            value = tl.load(source + i * BLOCK_K * ac, mask=there, other=0)
        else:
            value = tl.load(source + i * BLOCK_K * ac, mask=there & (i * BLOCK_K + k < depth)[None, :], other=0)
        w = tl.load(weights + i * BLOCK_K * br)
        if WIDE:
            value = value.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(value, w, total, input_precision=PRECISION)
    into = o
    if not SORTED:
        into = tl.load(order + o, mask=o < width, other=0).to(tl.int32)
    if BIAS:
        total += tl.load(bias + into, mask=o < width, other=0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN
    tl.store(y + (n[:, None] * yn + into[None, :]), total.to(y.dtype.element_ty), mask=there & (o < width)[None, :])


@triton.jit
def _gate(
    grad,
    y,
    d,
    partial,
    order,
    gn,
    gc,
    yn,
    yc,
    N,
    CO,
    o_tiles,
    n_tiles,
    programs,
    RELU: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """d = grad (y > 0) with its columns in sorted order, and its sum over the tiles p, p + programs, ..."""
    p = tl.program_id(0) // o_tiles
    o = ((tl.program_id(0) % o_tiles) * BLOCK_O + tl.arange(0, BLOCK_O))[None, :]
    column = tl.load(order + o, mask=o < CO, other=0)
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for tile in range(p, n_tiles, programs):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        if FAR:
            n = n.to(tl.int64)
        inside = (n < N) & (o < CO)
        g = tl.load(grad + (n * gn + column * gc), mask=inside, other=0)
        if RELU:
            g = tl.where(tl.load(y + (n * yn + column * yc), mask=inside, other=0) > 0, g, 0.0)
        g = g.to(d.dtype.element_ty)
        tl.store(d + (n * CO + o), g, mask=inside)
        total += g.to(tl.float32)
    tl.store(partial + (p * CO + o), tl.sum(total, axis=0)[None, :], mask=o < CO)


@triton.jit
def _weight_grad(
    d,
    x,
    partial,
    counts,
    dn,
    dc,
    xn,
    xc,
    N,
    CO,
    CI,
    i_tiles,
    n_tiles,
    chunk_tiles,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum over a chunk of samples of d[n, r] x[n, k], for a tile of r by k with a live weight."""
    t = tl.program_id(0) // i_tiles
    at = (tl.program_id(0) % i_tiles) * BLOCK_I
    if at < tl.load(counts + tl.minimum((t + 1) * BLOCK_O, CO) - 1):
        o = t * BLOCK_O + tl.arange(0, BLOCK_O)
        i = at + tl.arange(0, BLOCK_I)
        q = tl.arange(0, BLOCK_N)
        if FAR:
            q = q.to(tl.int64)
        total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        first = tl.program_id(1) * chunk_tiles
        for k in range(first, tl.minimum(first + chunk_tiles, n_tiles)):
            n = (k * BLOCK_N + q)[:, None]
            g = tl.load(d + (n * dn + o[None, :] * dc), mask=(n < N) & (o < CO)[None, :], other=0)
            value = tl.load(x + (n * xn + i[None, :] * xc), mask=(n < N) & (i < CI)[None, :], other=0)
            if WIDE:
                g = g.to(tl.float32)
                value = value.to(tl.float32)
            total = tl.dot(tl.trans(g), value, total, input_precision=PRECISION)
        target = partial + tl.program_id(1).to(tl.int64) * CO * CI + (o[:, None] * CI + i[None, :])
        tl.store(target, total, mask=(o < CO)[:, None] & (i < CI)[None, :])


@triton.jit
def _finish(
    partial, dweight, rows, columns, counts, CO, CI, c_tiles, chunks, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Adds the partial sums in order and puts them where the weights are; zero where a weight is dead."""
    r = ((tl.program_id(0) // c_tiles) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    k = ((tl.program_id(0) % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (r < CO) & (k < CI)
    live = inside & (k < tl.load(counts + r, mask=r < CO, other=0))
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    source = partial + (r * CI + k)
    for _ in range(chunks):
        total += tl.load(source, mask=live, other=0)
        source += CO * CI
    row = tl.load(rows + r, mask=r < CO, other=0)
    column = tl.load(columns + k, mask=k < CI, other=0)
    tl.store(dweight + (row * CI + column), total.to(dweight.dtype.element_ty), mask=inside)


# ---- launches ----

_IN_ORDER: Any = WeakIdKeyDictionary()  # permutation: its version, and whether it is the identity


def _in_order(order: Tensor) -> bool:
    """Whether a permutation is the identity; asked of the device once for each tensor, and never while a graph is
    captured."""
    if order.is_inference():
        return False
    known = _IN_ORDER.get(order)
    if known is None or known[0] != order._version:
        if order.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        known = order._version, bool((order[1:] > order[:-1]).all())
        _IN_ORDER[order] = known
    return bool(known[1])


class Tile(NamedTuple):
    """Rows and columns of a product's tile, the depth of a step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        return tile_options(self.warps, self.stages, self.registers)


def _covering(size: int, largest: int) -> int:
    """The smallest power of two from 16 to ``largest`` that covers ``size``, or else ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _tile(exact: bool, half: bool, far: bool, rows: int, columns: int, repeats: int = 1) -> Tile:
    """The largest tile of which there is one for each multiprocessor; ``exact``: float32 on FMA units."""
    if far:
        return Tile(_covering(rows, 64), _covering(columns, 64), 16, 8, 2)
    sizes = (
        ((128, 64), (64, 64), (64, 32), (32, 32)) if exact else ((128, 128), (128, 64), (64, 64), (32, 64), (32, 32))
    )
    for r, c in sizes:
        r, c = _covering(rows, r), _covering(columns, c)
        if cdiv(rows, r) * cdiv(columns, c) * repeats >= MULTIPROCESSORS:
            break
    depth = 16 if exact else 64 if half else 32
    return Tile(r, c, depth, 8 if r * c > 64 * 64 else 4 if r * c > 32 * 32 else 2, 2 if exact else 3)


def _grad_tile(exact: bool, half: bool, far: bool, out: int, inputs: int, samples: int) -> Tile:
    """Of the weight's gradient, whose samples are split into chunks where it has few tiles."""
    t = _tile(exact, half, far, out, inputs, repeats=max(1, samples // 256))
    return t._replace(registers=128) if half and t.warps <= 4 else t  # the assembler's own choice for sm_80 spills


def _far(*tensors: Tensor) -> bool:
    return any(t.shape[0] * t.stride(0) + t.shape[1] * t.stride(1) >= 2**31 for t in tensors)


def _launch(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    staircase: tuple[Tensor, ...],
    relu: bool,
    transposed: bool,
) -> None:
    """a, its columns sorted, times the live weights (or their transpose) into y, whose columns are in the user's
    order."""
    rows, columns, counts = staircase
    out, inputs = weight.shape
    depth, width = (out, inputs) if transposed else (inputs, out)
    how, half, far = precision(a), a.dtype is not torch.float32, _far(a, y)
    t = _tile(how == "ieee" and not half, half, far, a.shape[0], width)._replace(**TUNABLE["product"].now)
    tiles = cdiv(width, t.columns)
    deep, broad = cdiv(depth, t.depth) * t.depth, tiles * t.columns
    # TF32 takes operands whose depth lies together and nothing else.
    packed = torch.empty((broad, deep) if how == "tf32" else (deep, broad), dtype=a.dtype, device=a.device)
    packed = packed.t() if how == "tf32" else packed
    by_row = packed if transposed else packed.t()
    c_tiles = cdiv(by_row.shape[1], 64)
    if packed.numel():
        _pack[(cdiv(by_row.shape[0], 16) * c_tiles,)](
            weight,
            by_row,
            rows,
            columns,
            counts,
            *weight.stride(),
            *by_row.stride(),
            out,
            inputs,
            *by_row.shape,
            c_tiles,
            BLOCK_R=16,
            BLOCK_C=64,
        )
    order = columns if transposed else rows
    _product[(cdiv(a.shape[0], t.rows) * tiles,)](
        a,
        packed,
        packed if bias is None else bias.contiguous(),
        y,
        order,
        counts,
        *a.stride(),
        *packed.stride(),
        y.stride(0),
        a.shape[0],
        out,
        depth,
        width,
        tiles,
        TRANSPOSED=transposed,
        SORTED=_in_order(order),
        BIAS=bias is not None,
        RELU=relu,
        EVEN=depth % t.depth == 0,
        PRECISION=how,
        WIDE=wide(a),
        FAR=far,
        BLOCK_N=t.rows,
        BLOCK_O=t.columns,
        BLOCK_K=t.depth,
        **t.options,
    )


def _sorted(x: Tensor, columns: Tensor) -> Tensor:
    return x if _in_order(columns) else x.index_select(1, columns)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, counts: Tensor, activation: str
) -> Tensor:
    """y of genfast::masked_linear."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        rows, columns, counts = rows.contiguous(), columns.contiguous(), counts.contiguous()
        _launch(_sorted(x, columns), weight, bias, y, (rows, columns, counts), activation == "relu", False)
    return y


def _through(grad: Tensor, y: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """grad (y > 0), its columns sorted, and its sum over samples in the user's order."""
    n, out = grad.shape
    d = torch.empty((n, out), dtype=grad.dtype, device=grad.device)
    of_y = grad if y is None else y
    block = min(64, max(1, triton.next_power_of_2(out)))
    height = 1024 // block
    o_tiles, n_tiles = cdiv(out, block), cdiv(n, height)
    programs = min(n_tiles, ROWS)
    partial = torch.empty((programs, out), dtype=torch.float32, device=grad.device)
    _gate[(programs * o_tiles,)](
        grad,
        of_y,
        d,
        partial,
        rows,
        *grad.stride(),
        *of_y.stride(),
        n,
        out,
        o_tiles,
        n_tiles,
        programs,
        RELU=y is not None,
        FAR=_far(grad, of_y, d),
        BLOCK_N=height,
        BLOCK_O=block,
    )
    total = partial.sum(0)
    return d, total if _in_order(rows) else torch.empty_like(total).index_copy_(0, rows, total)


def _launch_weight_grad(d: Tensor, x: Tensor, dweight: Tensor, staircase: tuple[Tensor, ...]) -> None:
    out, inputs = dweight.shape
    how, half, far = precision(x), x.dtype is not torch.float32, _far(d, x)
    t = _grad_tile(how == "ieee" and not half, half, far, out, inputs, x.shape[0])._replace(
        **TUNABLE["weight_grad"].now
    )
    o_tiles, i_tiles, n_tiles = cdiv(out, t.rows), cdiv(inputs, t.columns), cdiv(x.shape[0], t.depth)
    # As many programs as run at once, at 16 warps a multiprocessor, half of them over dead weights; none of under 8
    # steps.
    at_once = 2 * MULTIPROCESSORS * 16 // t.warps
    chunk_tiles = max(8, cdiv(n_tiles, max(1, at_once // (o_tiles * i_tiles))))
    chunks = cdiv(n_tiles, chunk_tiles)
    partial = torch.empty((chunks, out, inputs), dtype=torch.float32, device=x.device)
    rows, columns, counts = staircase
    _weight_grad[(o_tiles * i_tiles, chunks)](
        d,
        x,
        partial,
        counts,
        *d.stride(),
        *x.stride(),
        x.shape[0],
        out,
        inputs,
        i_tiles,
        n_tiles,
        chunk_tiles,
        PRECISION=how,
        WIDE=wide(x),
        FAR=far,
        BLOCK_O=t.rows,
        BLOCK_I=t.columns,
        BLOCK_N=t.depth,
        **t.options,
    )
    c_tiles = cdiv(inputs, 64)
    _finish[(cdiv(out, 16) * c_tiles,)](
        partial, dweight, rows, columns, counts, out, inputs, c_tiles, chunks, BLOCK_R=16, BLOCK_C=64
    )


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of genfast::masked_linear_backward; an empty tensor for each that is not wanted."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (
        torch.empty(shape if w else (0,), dtype=x.dtype, device=x.device) for shape, w in zip(shapes, wanted)
    )
    if not grad.numel() or not x.numel():
        dbias = grad.sum(0) if wanted[2] else dbias
        return dx.zero_(), dweight.zero_(), dbias
    rows, columns, counts = rows.contiguous(), columns.contiguous(), counts.contiguous()
    staircase = (rows, columns, counts)
    if y is None and _in_order(rows):
        d, total = grad, grad.sum(0, dtype=torch.float32) if wanted[2] else dbias
    else:
        d, total = _through(grad, y, rows)
    if wanted[0]:
        _launch(d, weight, None, dx, staircase, False, True)
    if wanted[1]:
        _launch_weight_grad(d, _sorted(x, columns), dweight, staircase)
    return dx, dweight, dbias.copy_(total) if wanted[2] else dbias


def _variants() -> list[Aot]:
    found = []

    def add(
        label: str, kernel: Any, kind: str, ones: tuple[str, ...] | None, launch: dict[str, int], **base: Any
    ) -> None:
        pointers = dict.fromkeys(("a", "b", "x", "y", "d", "weight", "bias", "grad", "packed", "dweight"), f"*{kind}")
        pointers |= dict.fromkeys(("rows", "columns", "counts", "order"), "*i64") | {"partial": "*fp32"}
        types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
        found.append(variant(label, kernel, types, base, ones, **launch))

    for kind in ("fp32", "bf16", "fp16"):
        half = kind != "fp32"
        for how in ("ieee",) if half else ("ieee", "tf32"):
            exact = how == "ieee" and not half
            b_ones = ("br",) if how == "tf32" else ("bc",)
            sizes = ((2**16, 512), (1024, 512), (256, 512), (1, 64))
            for n, width in sizes[::3] if kind == "fp16" else sizes:
                for far in (False, True) if n == 2**16 and kind != "fp16" else (False,):
                    t = _tile(exact, half, far, n, width)
                    label = f"{t.rows}x{t.columns} {kind} {how}{' 64 bits' if far else ''}"
                    blocks = dict(BLOCK_N=t.rows, BLOCK_O=t.columns, BLOCK_K=t.depth)
                    base = dict(PRECISION=how, WIDE=False, FAR=far)
                    for transposed in (False, True):
                        ends = dict(TRANSPOSED=transposed, BIAS=not transposed, RELU=not transposed)
                        for even in (True, False) if n == 2**16 else (True,):
                            name = f"{label}{' dx' if transposed else ''}{'' if even else ' uneven, shuffled'}"
                            ones = None if far else ("ac", *b_ones)
                            add(name, _product, kind, ones, t.options, SORTED=even, EVEN=even, **base, **ends, **blocks)
                    t = _grad_tile(exact, half, far, width, width, n)
                    blocks = dict(BLOCK_O=t.rows, BLOCK_I=t.columns, BLOCK_N=t.depth)
                    label = f"{t.rows}x{t.columns} {kind} {how}{' 64 bits' if far else ''}"
                    add(label, _weight_grad, kind, None if far else ("dc", "xc"), t.options, **base, **blocks)
        for ones, form in ((("wi", "pc"), ""), (("wi", "pr"), ", transposed"), (None, ", any strides")):
            add(f"{kind}{form}", _pack, kind, ones, {}, BLOCK_R=16, BLOCK_C=64)
        add(f"to {kind}", _finish, kind, (), {}, BLOCK_R=16, BLOCK_C=64)
        for relu in (False, True):
            blocks = dict(BLOCK_N=16, BLOCK_O=64)
            add(f"{kind}{' relu' if relu else ''}", _gate, kind, ("gc", "yc"), {}, RELU=relu, FAR=False, **blocks)
        add(f"{kind} any strides", _gate, kind, None, {}, RELU=True, FAR=True, **blocks)
    return found


AOT = _variants()
