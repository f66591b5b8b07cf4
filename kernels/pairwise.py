"""Sums of kernels over pairs of rows (MMD: Gretton et al., JMLR 13, 2012; KID: Binkowski et al. 1801.01401), and
nearest rows:

    sums      o_i = sum_j sum_s k_s(x_i, y_j)
    gradient  dx_i = sum_j (g_i + h_j) 2 k'(d_ij) (x_i - y_j), or sum_j (g_i + h_j) k'(x_i.y_j) y_j for a polynomial
    nearest   the k least d_ij = |x_i - y_j|^2 of each i and their j

x (B, N, C), y (B, M, C). A program of the sums takes one tile of pairs: product, kernel, sums of its rows; of x with
itself only the tiles on and above the diagonal, and the sums of their columns too. Each writes its own place of (tiles,
B, N), which
is added up in order: no atomics, N / BLOCK values a row in place of N. The gradient's weights are written panel by
    panel, at
most PANEL elements at once, and multiplied with the rows (and a column of ones) by the library. Nearest: a program of
BLOCK rows walks over all columns, once for each of k. Distances are those of rows less their common mean.
FLOPs 2 N M C (half of it with itself), 4 N M C for the gradient; bytes 4 (N + M) C from the second-level cache for each
BLOCK
rows: bound by arithmetic, for float32 by the FMA rate unless torch's settings allow TF32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, cdiv, precision, variant, wide
from ._math import exp

BLOCK, FEATURES = 64, 32  # rows and columns of a tile, features of a step
TUNABLE = {
    "sums": Choice(
        {"block": BLOCK, "features": FEATURES, "warps": 0, "stages": 3, "registers": 0},
        [
            dict(block=b, features=f, warps=w, stages=s, registers=r)
            for b, f, w, s, r in (
                (64, 32, 4, 3, 0),
                (64, 32, 8, 3, 0),
                (64, 64, 4, 3, 0),
                (64, 64, 4, 4, 0),
                (128, 64, 8, 3, 0),
                (128, 32, 8, 3, 0),
                (128, 32, 8, 4, 0),
                (64, 16, 8, 3, 0),
            )
        ],
    )
}
PANEL = 1 << 24  # weights that are written at once
KERNELS = {"rbf": 0, "imq": 1, "polynomial": 2}


@triton.jit
def _argument(
    x,
    y,
    xn,
    yn,
    i,
    j,
    N,
    M,
    C,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What the kernel is a function of: products of rows i and j, or their squared distances."""
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    rows = x + i.to(tl.int64)[:, None] * C
    columns = y + j.to(tl.int64)[None, :] * C
    for first in range(0, C, FEATURES):
        c = (first + tl.arange(0, FEATURES)).to(tl.int32)
        a = tl.load(rows + c[None, :], mask=(i[:, None] < N) & (c[None, :] < C), other=0)
        b = tl.load(columns + c[:, None], mask=(c[:, None] < C) & (j[None, :] < M), other=0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total += tl.dot(a, b, input_precision=PRECISION)
    if not PRODUCT:
        of_rows = tl.load(xn + i, mask=i < N, other=0)
        of_columns = tl.load(yn + j, mask=j < M, other=0)
        total = tl.maximum((of_rows[:, None] + of_columns[None, :]) - 2 * total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return total


@triton.jit
def _kernel(d, scales, offset, COUNT: tl.constexpr, DEGREE: tl.constexpr, KERNEL: tl.constexpr, SLOPE: tl.constexpr):
    """sum_s k_s, or with SLOPE twice its derivative by a squared distance, its derivative by a product."""
    total = d * 0
    for n in tl.static_range(COUNT):
        s = tl.load(scales + n)
        if KERNEL == 0:
            k = exp(-s * d)
            if SLOPE:
                k = k * (-2 * s)
        elif KERNEL == 1:
            r = 1 / (s + d)
            k = s * r
            if SLOPE:
                k = k * r * -2
        else:
            base = s * d + offset
            k = d * 0 + 1
            for _ in tl.static_range(DEGREE - 1):
                k = k * base
            k = k * (s * DEGREE) if SLOPE else k * base
        total += k
    return total


@triton.jit
def _sums(
    x,
    y,
    xn,
    yn,
    scales,
    partial,
    offset,
    B,
    N,
    M,
    C,
    i_tiles,
    j_tiles,
    COUNT: tl.constexpr,
    DEGREE: tl.constexpr,
    KERNEL: tl.constexpr,
    SAME: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // (i_tiles * j_tiles)).to(tl.int64)
    i_tile = pid // j_tiles % i_tiles
    j_tile = pid % j_tiles
    if SAME and j_tile < i_tile:
        return
    i = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    j = (j_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    d = _argument(
        x + b * N * C,
        y + b * M * C,
        xn + b * N,
        yn + b * M,
        i,
        j,
        N,
        M,
        C,
        KERNEL == 2,
        BLOCK,
        FEATURES,
        PRECISION,
        WIDE,
    )
    if SAME and KERNEL != 2:  # a row's distance to itself is 0 but for rounding; NaN stays
        d = tl.where(i[:, None] == j[None, :], d * 0, d)
    counts = (i[:, None] < N) & (j[None, :] < M)
    if EXCLUDE:
        counts = counts & (i[:, None] != j[None, :])
    k = tl.where(counts, _kernel(d, scales, offset, COUNT, DEGREE, KERNEL, False), 0.0)
    tl.store(partial + (j_tile.to(tl.int64) * B + b) * N + i, tl.sum(k, axis=1), mask=i < N)
    if SAME and j_tile > i_tile:  # the tile on the diagonal holds both of a pair
        tl.store(partial + (i_tile.to(tl.int64) * B + b) * N + j, tl.sum(k, axis=0), mask=j < M)


@triton.jit
def _weights(
    x,
    y,
    xn,
    yn,
    scales,
    g,
    h,
    out,
    offset,
    N,
    M,
    C,
    first,
    rows,
    i_tiles,
    j_tiles,
    COUNT: tl.constexpr,
    DEGREE: tl.constexpr,
    KERNEL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of ``rows`` rows from ``first`` on: (B, rows, M)."""
    pid = tl.program_id(0)
    b = (pid // (i_tiles * j_tiles)).to(tl.int64)
    at = ((pid // j_tiles % i_tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    i = (first + at).to(tl.int32)
    j = ((pid % j_tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    d = _argument(
        x + b * N * C,
        y + b * M * C,
        xn + b * N,
        yn + b * M,
        i,
        j,
        N,
        M,
        C,
        KERNEL == 2,
        BLOCK,
        FEATURES,
        PRECISION,
        WIDE,
    )
    weight = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    if ROWS:
        weight += tl.load(g + b * N + i, mask=i < N, other=0)[:, None]
    if COLUMNS:
        weight += tl.load(h + b * M + j, mask=j < M, other=0)[None, :]
    weight = weight * _kernel(d, scales, offset, COUNT, DEGREE, KERNEL, True)
    if EXCLUDE:
        weight = tl.where(i[:, None] != j[None, :], weight, 0.0)
    there = (at[:, None] < rows) & (j[None, :] < M)
    tl.store(out + (b * rows + at.to(tl.int64)[:, None]) * M + j[None, :], weight, mask=there)


@triton.jit
def _nearest(
    x,
    y,
    xn,
    yn,
    last,
    last_index,
    out,
    out_index,
    N,
    M,
    C,
    i_tiles,
    j_tiles,
    AGAIN: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The least (distance, j) of each row; with AGAIN, of those that come after (last, last_index)."""
    b = (tl.program_id(0) // i_tiles).to(tl.int64)
    i = ((tl.program_id(0) % i_tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    best = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    chosen = tl.zeros((BLOCK,), dtype=tl.int32)
    if AGAIN:
        before = tl.load(last + b * N + i, mask=i < N, other=0)[:, None]
        before_index = tl.load(last_index + b * N + i, mask=i < N, other=0)[:, None]
    for j_tile in range(j_tiles):
        j = (j_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
        d = _argument(
            x + b * N * C, y + b * M * C, xn + b * N, yn + b * M, i, j, N, M, C, False, BLOCK, FEATURES, PRECISION, WIDE
        )
        counts = (j[None, :] < M) & (i[:, None] < N)
        if EXCLUDE:
            counts = counts & (i[:, None] != j[None, :])
        if AGAIN:
            counts = counts & ((d > before) | ((d == before) & (j[None, :] > before_index)))
        d = tl.where(counts, d, float("inf"))
        least = tl.min(d, axis=1)
        where = tl.min(tl.where(d == least[:, None], j[None, :], 2147483647), axis=1)
        better = least < best
        best = tl.where(better, least, best)
        chosen = tl.where(better, where, chosen)
    tl.store(out + b * N + i, best, mask=i < N)
    tl.store(out_index + b * N + i, chosen, mask=i < N)


def _warps(kind: str) -> int:
    """Four warps would spill what a tile of float32 operands keeps in registers."""
    return 8 if kind == "fp32" else 4


REGISTERS = 168  # more than the assembler grants of itself, which spills
TF32_REGISTERS = 255  # of _sums in TF32, whose eight warps are one program on a multiprocessor with either number
WEIGHTS_REGISTERS = 255  # of _weights: with any fewer some kind spills on some architecture


def _sums_registers(form: str) -> int:
    return TF32_REGISTERS if form == "tf32" else REGISTERS


def _launch(rows: Tensor) -> dict[str, Any]:
    kind = "fp32" if rows.dtype is torch.float32 else "half"
    return {"PRECISION": precision(rows), "WIDE": wide(rows), "num_warps": _warps(kind)}


@functools.lru_cache(256)
def _on_device(scales: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


def _prepared(x: Tensor, y: Tensor | None, product: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense rows and squared norms; for distances, float32 rows less the common mean."""
    if product:
        rows = x.contiguous()
        other = rows if y is None else y.contiguous()
        return rows, other, rows, other
    rows = x.float()
    other = rows if y is None else y.float()
    mean = (rows.sum(1, keepdim=True) + other.sum(1, keepdim=True)) / max(1, rows.shape[1] + other.shape[1])
    rows = (rows - mean).contiguous()
    other = rows if y is None else (other - mean).contiguous()
    norms = rows.square().sum(2)
    return rows, other, norms, norms if y is None else other.square().sum(2)


def pairwise_kernel_sum(
    x: Tensor, y: Tensor | None, kernel: str, scales: list[float], degree: int, offset: float, exclude_diagonal: bool
) -> Tensor:
    """o of genfast::pairwise_kernel_sum."""
    b, n, c = x.shape
    m = n if y is None else y.shape[1]
    if not (b and n and m):
        return torch.zeros((b, n), dtype=torch.float32, device=x.device)
    rows, other, xn, yn = _prepared(x, y, kernel == "polynomial")
    choice = TUNABLE["sums"]
    block, launch = choice["block"], _launch(rows)
    launch |= {"num_warps": choice["warps"] or launch["num_warps"], "num_stages": choice["stages"]}
    i_tiles, j_tiles = cdiv(n, block), cdiv(m, block)
    partial = torch.empty((j_tiles, b, n), dtype=torch.float32, device=x.device)
    _sums[(b * i_tiles * j_tiles,)](
        rows,
        other,
        xn,
        yn,
        _on_device(tuple(scales), x.device),
        partial,
        offset,
        b,
        n,
        m,
        c,
        i_tiles,
        j_tiles,
        COUNT=len(scales),
        DEGREE=degree,
        KERNEL=KERNELS[kernel],
        SAME=y is None,
        EXCLUDE=exclude_diagonal,
        BLOCK=block,
        FEATURES=choice["features"],
        maxnreg=choice["registers"] or _sums_registers(launch["PRECISION"]),
        **launch,
    )
    return partial.sum(0)


def _gradient(
    x: Tensor,
    y: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    kernel: str,
    scales: list[float],
    degree: int,
    offset: float,
    exclude: bool,
) -> Tensor:
    """dx with pairs weighted by g_i + h_j."""
    b, n, c = x.shape
    m = n if y is None else y.shape[1]
    if not (b and n and m and c):
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    product = kernel == "polynomial"
    rows, other, xn, yn = _prepared(x, y, product)
    given = g if g is not None else h
    assert given is not None
    right = other.float() if product else torch.cat((other, other.new_ones(b, m, 1)), 2)
    if y is None and not product:
        exclude = True  # a row pulls at itself with the greatest weight of all, which would leave its rounding behind
    step = max(BLOCK, PANEL // (b * m) // BLOCK * BLOCK)
    found = []
    for first in range(0, n, step):
        count = min(step, n - first)
        weights = torch.empty((b, count, m), dtype=torch.float32, device=x.device)
        i_tiles, j_tiles = cdiv(count, BLOCK), cdiv(m, BLOCK)
        _weights[(b * i_tiles * j_tiles,)](
            rows,
            other,
            xn,
            yn,
            _on_device(tuple(scales), x.device),
            given if g is None else g,
            given if h is None else h,
            weights,
            offset,
            n,
            m,
            c,
            first,
            count,
            i_tiles,
            j_tiles,
            COUNT=len(scales),
            DEGREE=degree,
            KERNEL=KERNELS[kernel],
            ROWS=g is not None,
            COLUMNS=h is not None,
            EXCLUDE=exclude,
            BLOCK=BLOCK,
            FEATURES=FEATURES,
            maxnreg=WEIGHTS_REGISTERS,
            **_launch(rows),
        )
        total = weights @ right
        if not product:
            total = rows[:, first : first + count] * total[..., c:] - total[..., :c]
        found.append(total)
    return torch.cat(found, 1).to(x.dtype)


def pairwise_kernel_sum_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    scales: list[float],
    degree: int,
    offset: float,
    exclude_diagonal: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dy) of genfast::pairwise_kernel_sum_backward."""
    g = grad.float().contiguous()
    options = (kernel, scales, degree, offset, exclude_diagonal)
    dx = _gradient(x, y, g, g if y is None else None, *options) if need_x else x.new_empty(0)
    dy = _gradient(y, x, None, g, *options) if need_y and y is not None else x.new_empty(0)
    return dx, dy


def nearest_rows(x: Tensor, y: Tensor | None, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """(squared distances, indices) of genfast::nearest_rows."""
    b, n, c = x.shape
    m = n if y is None else y.shape[1]
    index = torch.empty((k, b, n), dtype=torch.int32, device=x.device)
    if b and n:
        rows, other, xn, yn = _prepared(x, y, False)
        value = torch.empty((k, b, n), dtype=torch.float32, device=x.device)
        i_tiles = cdiv(n, BLOCK)
        for t in range(k):
            _nearest[(b * i_tiles,)](
                rows,
                other,
                xn,
                yn,
                value[max(0, t - 1)],
                index[max(0, t - 1)],
                value[t],
                index[t],
                n,
                m,
                c,
                i_tiles,
                cdiv(m, BLOCK),
                AGAIN=t > 0,
                EXCLUDE=exclude_self,
                BLOCK=BLOCK,
                FEATURES=FEATURES // 2,
                maxnreg=REGISTERS,
                **_launch(rows),
            )
    chosen = index.permute(1, 2, 0).long().sort(2).values  # ascending, so that equal distances stay so
    side = x if y is None else y
    near = side.float().gather(1, chosen.flatten(1).unsqueeze(2).expand(-1, -1, c)).unflatten(1, (n, k))
    distance, order = (x.float().unsqueeze(2) - near).square().sum(3).sort(dim=2, stable=True)
    return distance, chosen.gather(2, order)


def _variants() -> list[Aot]:
    """Sizes of 32 bits alone: more rows than that have too many pairs to wait for."""
    found = []
    names = ("x", "y", "xn", "yn", "scales", "partial", "g", "h", "out", "last")
    for name, kernel in KERNELS.items():
        for kind, form in (("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")):
            if kind != "fp32" and name != "polynomial":  # distances are those of float32 rows
                continue
            types = dict.fromkeys(names, "*fp32") | {"x": f"*{kind}", "y": f"*{kind}", "offset": "fp32"}
            if name == "polynomial":
                types |= {"xn": f"*{kind}", "yn": f"*{kind}"}
            common: dict[str, Any] = {"KERNEL": kernel, "COUNT": 1 if kernel == 2 else 7, "DEGREE": 3, "BLOCK": BLOCK}
            common |= {"FEATURES": FEATURES, "PRECISION": form, "WIDE": False}
            for same in (False, True):
                label, warps = f"{'itself' if same else 'two'}, {name} {kind} {form}", _warps(kind)
                own = {n: t for n, t in types.items() if n in _sums.arg_names}
                constants = common | {"SAME": same, "EXCLUDE": same}
                registers = _sums_registers(form)
                found.append(variant(label, _sums, own, constants, (), num_warps=warps, maxnreg=registers))
                own = {n: t for n, t in types.items() if n in _weights.arg_names}
                constants = common | {"ROWS": True, "COLUMNS": same, "EXCLUDE": same}
                found.append(variant(label, _weights, own, constants, (), num_warps=warps, maxnreg=WEIGHTS_REGISTERS))
    for form in ("ieee", "tf32"):
        for again in (False, True):
            types = dict.fromkeys(("x", "y", "xn", "yn", "last", "out"), "*fp32")
            types |= {"last_index": "*i32", "out_index": "*i32"}
            constants = {"AGAIN": again, "EXCLUDE": again, "BLOCK": BLOCK, "FEATURES": FEATURES // 2}
            constants |= {"PRECISION": form, "WIDE": False}
            found.append(
                variant(
                    f"{'next' if again else 'first'}, {form}",
                    _nearest,
                    types,
                    constants,
                    (),
                    num_warps=_warps("fp32"),
                    maxnreg=REGISTERS,
                )
            )
    return found


AOT = _variants()
