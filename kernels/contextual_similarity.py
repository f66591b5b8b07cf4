"""Contextual similarity (Mechrez et al. 1803.02077, section 3.2; the spatial term as in the code of Zhang et al.
1905.05169).

    d_ij = max(0, 1 - x_i.y_j) (cosine), max(0, |x_i|^2 + |y_j|^2 - 2 x_i.y_j) (l2), sum_c |x_ic - y_jc| (l1)
    m_i = min_j d_ij, r_i = m_i + eps, e_ij = exp((m_i - d_ij) / (h r_i)), A_ij = e_ij / sum_j e_ij, S = (1 - w) A + w P
    value_j = max_i S_ij over sources, value_i = max_j S_ij over targets
    backward, with u the gradient times A at the winners, V_i and U_i the sums of u and u t over those that row i wins,
    and f_ij = -d(d_ij)/d(x_i): y_j (cosine), 2 (y_j - x_i) (l2), sign(y_j - x_i) (l1); nothing through a distance of
    zero dx_i = (sum_won u f - V_i sum_j A_ij f_ij) / (h r_i) - q_i f_ia,    q_i = (U_i - V_i T_i) / (h r_i), a the
    nearest dy_j = sum_won u f' / (h r_i) - sum_i A_ij V_i f'_ij / (h r_i) - sum_{i: a_i = j} q_i f'_ij,    f' =
    -d(d_ij)/d(y_j)

Where x_i lies on its nearest a, A_ia is 1 to rounding and h r_i is as small as h eps: what is left of u_ia - A_ia V_i
would be rounding times 1 / (h eps). These weights sum to zero over j, so that all sums leave out the nearest and are
relative to it: t'_ij = (d_ij - m_i) / r_i for t, y_j - y_a in the mean, and for j = a minus the sum of the others. Each
    sweep knows the nearest
by its index, since the products of two sweeps need not agree to the bit.

x (B, N, C), y (B, M, C), P_ij = prior_rows[i, r] prior_columns[i, c] for target j = (r, c). No array of N x M is
written. The exponent's scale depends on the row's minimum, so a running softmax cannot be rescaled: three sweeps over
the pairs, each a product whose tiles end in a reduction along the streamed axis:

    _best     owner i: the least d and its index;    owner j (or, with P over targets, i): the greatest S and its index
    _attend   owner i: sum_j e, sum_j e (d - m) and, for the backward, sum_j e y_j;    owner j: sum_i e V_i x_i

A program owns a tile of rows (or columns) and streams tiles of the other side. Where owners are too few to fill the
device, the stream is split, by the shape alone, and small kernels join the parts in order: no atomics, the same bits in
each run, ties to the lowest index, parts of at most O((N + M) C). Over targets without P the third sweep is not needed:
the winner is the nearest. The backward sweeps only rows that won something (listed on the device: nothing waits for the
host), and none for dx where the mean sum_j A_ij y_j was kept, except for rows that touch a target, where the mean
counts what must not flow. Sums over the columns that a row won run over a stable sort of the winners, again in order.

FLOPs: 2 N M C a sweep and one more product for the mean: 6 N M C forward, 8 with the mean; 4 R M C for dx and 4 R M C
    for dy
of R active rows (0.4 to 0.7 N on features of networks). Bytes: each operand once, N C + M C, then N M C / BLOCK from
L2: at N = M = 4096, C = 256 in bfloat16 4 MB from memory for 26 GFLOP, 6500 FLOPs a byte where an H200's tensor cores
    balance at 206;
so bound by arithmetic, where eager moves 61 arrays of N x M (4.1 GB). N M exponentials a sweep of _attend: 1 for 2 C
FLOPs, hidden below the product from C = 64 on.

Tiles (sm_90): in half types up to 256 channels on an H100 or H200 _best and the sums of e hold their owners' whole rows
    in
shared memory (64 KB) and stream 128 or 64 rows at a time, the next while these are multiplied; else _best takes 128 x
128 by 64 channels (96 KB for three stages, of the 99 KB that a consumer card has too; 128 FLOPs a byte from L2), 32
channels in TF32, and 128 x 64 where an element of the product costs more registers than a minimum; 64 x 64 by 16 on the
FMA units. _attend holds whole rows up to 256 channels in half types, so that the streamed tile is loaded once and is
the operand of both products, with 64 x 64 (backward 64 x 32) accumulators of e; wider rows, and float32, run over
channels in steps and write 64 to 256 channels of the sum a program, each of which computes e again. l1 has no product:
32 x 32 tiles, a feature at a time, and gradients 16 features at a time, 3 N M C and 10 N M C FLOPs. Half types take
products on tensor cores and keep all sums, statistics and logarithms in float32; e in [0, 1] alone is rounded to the
type for its product. float32 follows torch.backends.cuda.matmul.allow_tf32; with d clamped at zero TF32 stays finite.

Predicted, not yet run on a GPU (N = M = 16384, C = 256, bfloat16 on an H200 at 790 TFLOP/s): a tile of 128 x 128 takes
2048 cycles of wgmma, 32 bytes a cycle from L2, and about 800 (nearest), 1600 (winner) and 2600 (exponentials) of its
four schedulers, which do not overlap with one program a multiprocessor: 72%, 56% and 44% of the rate, so 0.24 + 0.31 +
0.39 ms for the sweeps of the forward. Eager moves some 25 arrays of 1 GB there, about 6 ms: 6 times as long.
"""

from __future__ import annotations

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
    check_samples,
    hopper,
    parts,
    precision,
    tile_options,
    variant,
    wide,
)
from ._math import exp

WHOLE = 256  # channels up to which half types keep whole rows
ROWS = 32  # rows of a program that joins parts
ENTRIES = 4  # winners of each row that a program takes at a time
OWNERS = 4  # rows whose gradient a program joins
DISTANCES = ("cosine", "l2", "l1")
_STEPS = [
    dict(owners=o, streamed=s, depth=64, channels=16, whole=0, warps=8, stages=3, registers=r, at_once=n)
    for o, s, r, n in ((128, 128, 0, 1), (128, 128, 128, 2), (128, 64, 0, 1), (128, 256, 0, 1), (256, 64, 0, 1))
]
_WHOLES = [
    dict(owners=o, streamed=s, depth=256, channels=256, whole=1, warps=w, stages=k, registers=0, at_once=n)
    for o, s, w, k, n in (
        (128, 128, 8, 2, 1),
        (128, 64, 8, 2, 1),
        (128, 64, 8, 3, 1),
        (64, 64, 4, 2, 2),
        (64, 128, 4, 2, 1),
    )
]
# Each of the tile's fields that another than the rule's is tried of; whole rows have at most 256 channels.
TUNABLE = {
    **{score: by_rule(*_STEPS, *_WHOLES) for score in ("least", "greatest", "mass")},
    "prior": by_rule(*_STEPS),
    "sums": by_rule(*_WHOLES),
    "backward": by_rule(dict(streamed=64), dict(owners=128, streamed=32), dict(stages=3), dict(warps=4)),
}
FEATURES = 16  # of an l1 gradient's program


# ---- pieces ----


@triton.jit
def _part(size, splits, split, BLOCK: tl.constexpr):
    """First and last tile of the stream that this split takes."""
    tiles = tl.cdiv(size, BLOCK)
    steps = tl.cdiv(tiles, splits)
    first = split * steps
    return first, tl.minimum(first + steps, tiles)


@triton.jit
def _load(a, row, there, c, C: tl.constexpr, WIDE: tl.constexpr):
    """Channels c of rows of (rows, C)."""
    value = tl.load(a + row.to(tl.int64)[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0)
    return value.to(tl.float32) if WIDE else value


@triton.jit
def _raw(
    own,
    other,
    own_norm,
    other_norm,
    o,
    s,
    o_in,
    s_in,
    owners,
    others,
    C: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Distances of owners o and streamed rows s, before the clamp; l1 takes rows with their positions innermost."""
    total = tl.zeros((BLOCK_O, BLOCK_S), dtype=tl.float32)
    if DISTANCE == "l1":
        at = own + o
        by = other + s
        for _ in range(C):
            a = tl.load(at, mask=o_in, other=0).to(tl.float32)
            b = tl.load(by, mask=s_in, other=0).to(tl.float32)
            total += tl.abs(a[:, None] - b[None, :])
            at += owners
            by += others
        return total
    for k in range(0, C, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        a = _load(own, o, o_in, c, C, WIDE)
        b = _load(other, s, s_in, c, C, WIDE)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return _from_product(total, own_norm, other_norm, o, s, o_in, s_in, DISTANCE)


@triton.jit
def _from_product(product, own_norm, other_norm, o, s, o_in, s_in, DISTANCE: tl.constexpr):
    if DISTANCE == "l2":
        a = tl.load(own_norm + o, mask=o_in, other=0)
        b = tl.load(other_norm + s, mask=s_in, other=0)
        return a[:, None] + b[None, :] - 2.0 * product
    return 1.0 - product


@triton.jit
def _prior(prior_rows, prior_columns, i, j, inside, high, across):
    """P_ij for i and j of one shape."""
    row = tl.load(prior_rows + i.to(tl.int64) * high + j // across, mask=inside, other=0).to(tl.float32)
    return row * tl.load(prior_columns + i.to(tl.int64) * across + j % across, mask=inside, other=0).to(tl.float32)


# ---- sweeps ----


@triton.jit
def _norms(x, norm, size, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """|x_i|^2."""
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for k in range(0, C, BLOCK_K):
        value = _load(x, i, i < size, k + tl.arange(0, BLOCK_K), C, True)
        total += value * value
    tl.store(norm + i, tl.sum(total, axis=1), mask=i < size)


@triton.jit
def _best(
    x,
    y,
    x_norm,
    y_norm,
    prior_rows,
    prior_columns,
    statistics,
    nearest,
    log_sum,
    value,
    index,
    N,
    M,
    high,
    across,
    splits,
    scale,
    eps,
    weight,
    C: tl.constexpr,
    DISTANCE: tl.constexpr,
    NEAREST: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRIOR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The greatest score along the stream and its lowest index: -d_ij with NEAREST, else log A_ij, or S_ij with PRIOR.

    Owners are the rows x or, with COLUMNS, y; ``scale`` is 1/h.
    """
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    o = (tl.program_id(0) // splits) * BLOCK_O + tl.arange(0, BLOCK_O)
    x += b * N * C
    y += b * M * C
    x_norm += b * N
    y_norm += b * M
    statistics += b * 3 * N
    log_sum += b * N
    nearest += b * N
    owners, others = (M, N) if COLUMNS else (N, M)
    own, other = (y, x) if COLUMNS else (x, y)
    own_norm, other_norm = (y_norm, x_norm) if COLUMNS else (x_norm, y_norm)
    o_in = o < owners
    best = tl.full((BLOCK_O,), float("-inf"), dtype=tl.float32)
    found = tl.zeros((BLOCK_O,), dtype=tl.int32)
    if not NEAREST and not COLUMNS:
        least = tl.load(statistics + o, mask=o_in, other=0)[:, None]
        of_sum = tl.load(log_sum + o, mask=o_in, other=0)[:, None]
        near = tl.load(nearest + o, mask=o_in, other=-1).to(tl.int32)[:, None]
    if WHOLE:
        c = tl.arange(0, BLOCK_K)
        mine = _load(own, o, o_in, c, C, WIDE)
    first, last = _part(others, splits, split, BLOCK_S)
    for tile in range(first, last):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        s_in = s < others
        if WHOLE:
            product = tl.dot(mine, tl.trans(_load(other, s, s_in, c, C, WIDE)), input_precision=PRECISION)
            raw = _from_product(product, own_norm, other_norm, o, s, o_in, s_in, DISTANCE)
        else:
            raw = _raw(
                own,
                other,
                own_norm,
                other_norm,
                o,
                s,
                o_in,
                s_in,
                owners,
                others,
                C,
                DISTANCE,
                PRECISION,
                WIDE,
                BLOCK_O,
                BLOCK_S,
                BLOCK_K,
            )
        score = tl.where(raw < 0, 0.0, -raw)  # keeps NaN
        if not NEAREST:
            if COLUMNS:
                least = tl.load(statistics + s, mask=s_in, other=0)[None, :]
                of_sum = tl.load(log_sum + s, mask=s_in, other=0)[None, :]
                near = tl.load(nearest + s, mask=s_in, other=-1).to(tl.int32)[None, :]
            score = tl.minimum(score + least, 0.0, propagate_nan=tl.PropagateNan.ALL)
            score = tl.where(near == (o[:, None] if COLUMNS else s[None, :]), score * 0.0, score)
            score = score * (scale / (least + eps)) - of_sum
            if PRIOR:
                i, j = (s[None, :], o[:, None]) if COLUMNS else (o[:, None], s[None, :])
                inside = o_in[:, None] & s_in[None, :]
                score = (1.0 - weight) * exp(score) + weight * _prior(
                    prior_rows, prior_columns, i, j, inside, high, across
                )
        score = tl.where(s_in[None, :], score, float("-inf"))
        top = tl.max(score, axis=1)
        at = tl.min(tl.where(score == top[:, None], s[None, :], 2147483647), axis=1)
        better = top > best
        best = tl.where(better, top, best)
        found = tl.where(better, at, found)
    to = (b * splits + split) * owners + o
    tl.store(value + to, best, mask=o_in)
    tl.store(index + to, found, mask=o_in)


@triton.jit
def _pick(
    part,
    part_index,
    value,
    index,
    poison,
    owners,
    value_stride,
    splits,
    NEAREST: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Joins the parts of _best: the first of the greatest. ``poison`` is 0, or NaN where a row is not finite."""
    b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = o < owners
    at = b * splits * owners + o
    best = tl.load(part + at, mask=there, other=0)
    found = tl.load(part_index + at, mask=there, other=0)
    for _ in range(1, splits):
        at += owners
        top = tl.load(part + at, mask=there, other=0)
        better = top > best
        best = tl.where(better, top, best)
        found = tl.where(better, tl.load(part_index + at, mask=there, other=0), found)
    if NEAREST:
        best = 0.0 - best
    else:
        if LOG:
            best = exp(best)
        best += tl.load(poison + b)
    tl.store(value + b * value_stride + o, best, mask=there)
    tl.store(index + b * owners + o, found.to(tl.int64), mask=there)


@triton.jit
def _attend(
    x,
    y,
    x_rows,
    y_rows,
    x_norm,
    y_norm,
    statistics,
    nearest,
    rate,
    rate_top,
    rows,
    count,
    winner,
    pull,
    mass,
    moment,
    out,
    N,
    M,
    splits,
    scale,
    eps,
    C: tl.constexpr,
    DISTANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUM: tl.constexpr,
    SOURCES: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums along the stream, but for j = a_i, of e_ij (``mass``), e_ij (d_ij - m_i) (``moment``, forward alone) and,
    with SUM, e_ij times its row.

    BACKWARD: over the first ``count`` of ``rows``, with no e where d is zero, and what ``pull`` holds of winners there
        is set
    to zero. COLUMNS: owners are columns, and e_ij is weighed by rate_i / rate_top. l1 sums e_ij sign(streamed - owner),
    and takes distances from x and y with their positions innermost; x_rows and y_rows are the same as rows.
    """
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = (tl.program_id(0) // splits) * BLOCK_O + tl.arange(0, BLOCK_O)
    x += b * N * C
    y += b * M * C
    x_rows += b * N * C
    y_rows += b * M * C
    x_norm += b * N
    y_norm += b * M
    statistics += b * 3 * N
    nearest += b * N
    rate += b * N
    rows += b * N
    winner += b * (M if SOURCES else N)
    pull += b * (M if SOURCES else N)
    owners, others = (M, N) if COLUMNS else (N, M)
    own, other = (y, x) if COLUMNS else (x, y)
    own_rows, other_rows = (y_rows, x_rows) if COLUMNS else (x_rows, y_rows)
    own_norm, other_norm = (y_norm, x_norm) if COLUMNS else (x_norm, y_norm)
    o, o_in, streamed = slot, slot < owners, others
    if BACKWARD:
        active = tl.load(count + b).to(tl.int32)
        if COLUMNS:
            streamed = active
        else:
            o_in = slot < active
            o = tl.load(rows + slot, mask=o_in, other=0).to(tl.int32)
    first, last = _part(streamed, splits, split, BLOCK_S)
    if BACKWARD and not COLUMNS:
        last = tl.where((tl.program_id(0) // splits) * BLOCK_O < active, last, first)
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    of_mass = tl.zeros((BLOCK_O,), dtype=tl.float32)
    of_moment = tl.zeros((BLOCK_O,), dtype=tl.float32)
    if not COLUMNS:
        least = tl.load(statistics + o, mask=o_in, other=1)[:, None]
        near = tl.load(nearest + o, mask=o_in, other=-1).to(tl.int32)[:, None]
    if WHOLE:
        mine = _load(own, o, o_in, c, C, WIDE)
    if SUM and DISTANCE == "l1":
        here = _load(own_rows, o, o_in, c, C, True)
    if COLUMNS:
        unit = 1.0 / tl.load(rate_top)
    for tile in range(first, last):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        s_in = s < streamed
        if BACKWARD and COLUMNS:
            s = tl.load(rows + s, mask=s_in, other=0).to(tl.int32)
        if WHOLE:
            theirs = _load(other, s, s_in, c, C, WIDE)
            product = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION)
            raw = _from_product(product, own_norm, other_norm, o, s, o_in, s_in, DISTANCE)
        else:
            raw = _raw(
                own,
                other,
                own_norm,
                other_norm,
                o,
                s,
                o_in,
                s_in,
                owners,
                others,
                C,
                DISTANCE,
                PRECISION,
                WIDE,
                BLOCK_O,
                BLOCK_S,
                BLOCK_K,
            )
        if COLUMNS:
            least = tl.load(statistics + s, mask=s_in, other=1)[None, :]
            near = tl.load(nearest + s, mask=s_in, other=-1).to(tl.int32)[None, :]
        inside = o_in[:, None] & s_in[None, :]
        farther = tl.maximum(tl.where(raw < 0, 0.0, raw) - least, 0.0, propagate_nan=tl.PropagateNan.ALL)
        e = exp(-farther * (scale / (least + eps)))
        e = tl.where(
            near == (o[:, None] if COLUMNS else s[None, :]), raw - raw, e
        )  # 0, but what is not finite stays seen
        e = tl.where(inside, e, 0.0)
        if BACKWARD and DISTANCE != "l1":  # noqa: SIM102
            if tl.min(least) == 0:  # else no distance here is zero
                dead = inside & (raw <= 0)
                e = tl.where(dead, 0.0, e)
                if COLUMNS == SOURCES:
                    won = tl.load(winner + o, mask=o_in, other=-1).to(tl.int32)[:, None] == s[None, :]
                    lost = tl.max(tl.where(dead & won, 1, 0), axis=1)
                    tl.store(pull + o, o * 0.0, mask=o_in & (lost > 0))
                else:
                    won = tl.load(winner + s, mask=s_in, other=-1).to(tl.int32)[None, :] == o[:, None]
                    lost = tl.max(tl.where(dead & won, 1, 0), axis=0)
                    tl.store(pull + s, s * 0.0, mask=s_in & (lost > 0))
        if COLUMNS:
            e = e * (tl.load(rate + s, mask=s_in, other=0) * unit)[None, :]
        of_mass += tl.sum(e, axis=1)
        if not BACKWARD:
            of_moment += tl.sum(e * farther, axis=1)
        if SUM:
            if DISTANCE == "l1":
                there = _load(other_rows, s, s_in, c, C, True)
                difference = there[None, :, :] - here[:, None, :]
                sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
                total += tl.sum(sign * e[:, :, None], axis=1)
            else:
                if not WHOLE:
                    theirs = _load(other_rows, s, s_in, c, C, WIDE)
                total = tl.dot(e.to(theirs.dtype), theirs, total, input_precision=PRECISION)
    to = (b * splits + split) * owners + o
    if SUM:
        tl.store(out + to[:, None] * C + c[None, :], total, mask=o_in[:, None] & (c < C)[None, :])
    of_first = o_in & (slot * 0 + tl.program_id(2) == 0)
    tl.store(mass + to, of_mass, mask=of_first)
    if not BACKWARD:
        tl.store(moment + to, of_moment, mask=of_first)


# ---- what joins them ----


@triton.jit
def _finish(
    mass,
    moment,
    out,
    y,
    statistics,
    log_sum,
    nearest,
    value,
    winner,
    mean,
    N,
    M,
    splits,
    scale,
    eps,
    C: tl.constexpr,
    TARGETS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum_j e but for the nearest, sum_j A t' and the mean less the nearest,
    of each row from the parts of _attend; TARGETS: also
    the greatest A, which is the nearest's."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = i < N
    at = b * splits * N + i
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    of_moment = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for k in range(splits):
        total += tl.load(mass + at + k * N, mask=there, other=0)
        of_moment += tl.load(moment + at + k * N, mask=there, other=0)
    rest = total
    total = 1.0 + rest
    r = tl.load(statistics + b * 3 * N + i, mask=there, other=0) + eps
    tl.store(log_sum + b * N + i, tl.log(total), mask=there)
    tl.store(statistics + b * 3 * N + N + i, rest, mask=there)
    tl.store(statistics + b * 3 * N + 2 * N + i, of_moment / (total * r), mask=there)
    near = tl.load(nearest + b * N + i, mask=there, other=0)
    if TARGETS:
        tl.store(value + b * N + i, 1.0 / total, mask=there)
        tl.store(winner + b * N + i, near, mask=there)
    if MEAN:
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            inside = there[:, None] & (c < C)[None, :]
            row = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
            for k in range(splits):
                row += tl.load(out + (at + k * N)[:, None] * C + c[None, :], mask=inside, other=0)
            row -= rest[:, None] * tl.load(y + (b * M + near)[:, None] * C + c[None, :], mask=inside, other=0).to(
                tl.float32
            )
            tl.store(mean + (b * N + i)[:, None] * C + c[None, :], row / total[:, None], mask=inside)


@triton.jit
def _share(
    grad,
    value,
    winner,
    order,
    starts,
    prior_rows,
    prior_columns,
    statistics,
    nearest,
    rate,
    swept_rate,
    pull,
    toward,
    toward_columns,
    N,
    M,
    high,
    across,
    scale,
    eps,
    weight,
    SOURCES: tl.constexpr,
    PRIOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Of rows i: what each that they win but the nearest pulls, u/(h r_i); V_i/(h r_i), alone and by sum_j e_ij; and
    what the
    nearest pulls: -q_i, and for columns also minus the sum of all other weights."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    known = i < N
    won = M if SOURCES else N
    least = tl.load(statistics + b * 3 * N + i, mask=known, other=1)
    rest = tl.load(statistics + b * 3 * N + N + i, mask=known, other=0)
    of_log = tl.log(1.0 + rest)
    of_t = tl.load(statistics + b * 3 * N + 2 * N + i, mask=known, other=0)
    near = tl.load(nearest + b * N + i, mask=known, other=-1).to(tl.int32)
    r = least + eps
    if SOURCES:
        first = tl.load(starts + b * (N + 1) + i, mask=known, other=0).to(tl.int32)
        last = tl.load(starts + b * (N + 1) + i + 1, mask=known, other=0).to(tl.int32)
    else:
        first = i
        last = tl.where(known, i + 1, i)
    of_u = tl.zeros((BLOCK_R,), dtype=tl.float32)
    of_others = tl.zeros((BLOCK_R,), dtype=tl.float32)
    of_ut = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, tl.max(last - first), BLOCK_E):
        k = first[:, None] + (start + tl.arange(0, BLOCK_E))[None, :]
        there = k < last[:, None]
        at = tl.load(order + b * M + k, mask=there, other=0).to(tl.int32) if SOURCES else k
        a = tl.load(value + b * won + at, mask=there, other=0)
        j = at if SOURCES else tl.load(winner + b * N + at, mask=there, other=0).to(tl.int32)
        if PRIOR:
            spatial = _prior(prior_rows, prior_columns, j * 0 + i[:, None], j, there, high, across)
            a = tl.maximum((a - weight * spatial) / (1.0 - weight), 0.0)
        u = tl.load(grad + b * won + at, mask=there, other=0).to(tl.float32) * a
        if PRIOR:
            u *= 1.0 - weight
        t = tl.maximum(-(tl.log(tl.maximum(a, 2e-38)) + of_log[:, None]) / scale, 0.0)
        of_u += tl.sum(u, axis=1)
        u = tl.where(j == near[:, None], u * 0.0, u)
        of_others += tl.sum(u, axis=1)
        of_ut += tl.sum(u * t, axis=1)
        tl.store(pull + b * won + at, u * (scale / r)[:, None], mask=there)
    by = of_u * (scale / r)
    tl.store(rate + b * N + i, by, mask=known)
    tl.store(swept_rate + b * N + i, by / (1.0 + rest), mask=known)
    # Where the distance is zero nothing flows to the nearest, and nothing is relative to it.
    near_pull = tl.where(least == 0, 0.0, (of_u * of_t - of_ut) * (scale / r))
    of_rest = tl.where(least == 0, 0.0, of_others * (scale / r) - by * (rest / (1.0 + rest)))
    tl.store(toward + b * N + i, near_pull, mask=known)
    tl.store(toward_columns + b * N + i, near_pull - of_rest, mask=known)


@triton.jit
def _along(
    other,
    order,
    starts,
    index,
    pulls,
    o,
    known,
    c,
    here,
    base,
    others,
    b,
    owners,
    C: tl.constexpr,
    L1: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of pulls, and of pulls times other rows less ``base``: those that ``order`` lists for each owner or the one
    at ``index``."""
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    of_pulls = tl.zeros((BLOCK_R,), dtype=tl.float32)
    if LISTED:
        first = tl.load(starts + b * (owners + 1) + o, mask=known, other=0).to(tl.int32)
        last = tl.load(starts + b * (owners + 1) + o + 1, mask=known, other=0).to(tl.int32)
    else:
        first = o
        last = tl.where(known, o + 1, o)
    for start in range(0, tl.max(last - first), BLOCK_E):
        k = first[:, None] + (start + tl.arange(0, BLOCK_E))[None, :]
        there = k < last[:, None]
        if LISTED:
            z = tl.load(order + b * others + k, mask=there, other=0)
            pull = tl.load(pulls + b * others + z, mask=there, other=0)
        else:
            z = tl.load(index + b * owners + k, mask=there, other=0)
            pull = tl.load(pulls + b * owners + k, mask=there, other=0)
        inside = there[:, :, None] & (c < C)[None, None, :]
        row = tl.load(other + z[:, :, None] * C + c[None, None, :], mask=inside, other=0).to(tl.float32)
        if L1:
            difference = row - here[:, None, :]
            row = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
        row -= base[:, None, :]
        total += tl.sum(row * pull[:, :, None], axis=1)
        of_pulls += tl.sum(pull, axis=1)
    return total, of_pulls


@triton.jit
def _gradient(
    own,
    other,
    grad,
    order,
    starts,
    index,
    pull,
    near_order,
    near_starts,
    nearest,
    toward,
    statistics,
    rate,
    swept_rate,
    rate_top,
    swept,
    mass,
    out,
    mean,
    owners,
    others,
    splits,
    C: tl.constexpr,
    DISTANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of some rows (or columns): winners, less the sweep's sum or the mean that was kept, and the
    nearest."""
    b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = o < owners
    own += b * owners * C
    other += b * others * C
    L1: tl.constexpr = DISTANCE == "l1"
    here = _load(own, o, known, c, C, True)
    zero = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    base = zero
    if not COLUMNS:  # a row's weights sum to that of the nearest alone, which all others are relative to
        apart = tl.load(statistics + b * 3 * owners + o, mask=known, other=0) > 0
        base = _load(other, tl.load(nearest + b * owners + o, mask=known, other=0), known & apart, c, C, True)
        if L1:
            difference = tl.where(apart[:, None], base - here, 0.0)
            base = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
    total, pulls = _along(
        other,
        order,
        starts,
        index,
        pull,
        o,
        known,
        c,
        here,
        base,
        others,
        b,
        owners,
        C,
        L1,
        LISTED,
        BLOCK_R,
        BLOCK_E if LISTED else 1,
        BLOCK_C,
    )
    near, near_pulls = _along(
        other,
        near_order,
        near_starts,
        nearest,
        toward,
        o,
        known,
        c,
        here,
        zero,
        others,
        b,
        owners,
        C,
        L1,
        COLUMNS,
        BLOCK_R,
        BLOCK_E if COLUMNS else 1,
        BLOCK_C,
    )
    total += near
    use = known
    if COLUMNS:
        by = tl.zeros((BLOCK_R,), dtype=tl.float32) + tl.load(rate_top)
    else:
        by = tl.load(swept_rate + b * owners + o, mask=known, other=0)
        use = tl.load(swept + b * owners + o, mask=known, other=0) != 0
    at = b * splits * owners + o
    row = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    of_mass = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for k in range(splits):
        inside = use[:, None] & (c < C)[None, :]
        row += tl.load(out + (at + k * owners)[:, None] * C + c[None, :], mask=inside, other=0)
        of_mass += tl.load(mass + at + k * owners, mask=use, other=0)
    total -= by[:, None] * (row - of_mass[:, None] * base)
    pulls -= by * of_mass
    if MEAN:
        kept = known & (use == 0)
        by = tl.load(rate + b * owners + o, mask=kept, other=0)
        inside = kept[:, None] & (c < C)[None, :]
        total -= by[:, None] * tl.load(mean + (b * owners + o)[:, None] * C + c[None, :], mask=inside, other=0)
    if not COLUMNS:
        pulls = tl.where(apart, 0.0, pulls)
    pulls += near_pulls
    if DISTANCE == "l2":
        total = 2.0 * (total - here * pulls[:, None])
    to = grad + (b * owners + o)[:, None] * C + c[None, :]
    tl.store(to, total.to(grad.dtype.element_ty), mask=known[:, None] & (c < C)[None, :])


# ---- launches ----


class Tile(NamedTuple):
    """Owners, streamed rows and channels of a step; channels of a sum; whether rows are held whole."""

    owners: int
    streamed: int
    depth: int
    channels: int
    whole: bool
    warps: int
    stages: int
    registers: int = 0  # at most, where the assembler's own choice spills or leaves room for one program alone
    at_once: int = 2  # programs that a multiprocessor runs together

    @property
    def options(self) -> dict[str, int]:
        return tile_options(self.warps, self.stages, self.registers)


def _depth(c: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(c)))


def _best_tile(how: str, half: bool, distance: str, c: int, score: str = "least", large: bool = False) -> Tile:
    """``score``: "least", "greatest" or "prior", each of which needs more registers for an element of the product.

    ``large``: on a GPU whose tiles may be.
    """
    if distance == "l1":
        return Tile(32, 32, 16, 16, False, 4, 2, at_once=4)
    if half or how == "tf32":
        owners, streamed = (
            (64, 64) if score == "prior" else (128, 128 if score == "least" and distance == "cosine" else 64)
        )
        whole = _depth(c, WHOLE)
        light = score == "least" or score == "greatest" and distance == "cosine"
        if half and c <= WHOLE and light and large:
            return Tile(owners, streamed, whole, whole, True, 8, 2, at_once=1 if whole > 128 else 2)
        registers = 0 if half or score != "prior" else 168
        depth = _depth(c, 64 if half else 32)
        return Tile(owners, streamed, depth, 16, False, 8, 3, registers, at_once=2 if score == "least" else 1)
    return Tile(64, 64, 16, 16, False, 8 if score == "prior" else 4, 2, 224, 1 if score == "prior" else 2)


def _attend_tile(how: str, half: bool, distance: str, c: int, sums: bool, backward: bool, large: bool = False) -> Tile:
    if distance == "l1":
        return (
            Tile(16, 16, 16, FEATURES, False, 4, 2, at_once=4) if sums else Tile(32, 32, 16, 16, False, 4, 2, at_once=4)
        )
    if not sums:
        return _best_tile(how, half, distance, c, "greatest", large)
    if half:
        channels = _depth(c, 128 if backward and c > WHOLE else 256)
        streamed = 32 if backward else 64
        depth = _depth(c, 32 if backward else 64)
        whole = c <= (128 if backward and distance == "l2" else WHOLE)  # the norms of both sides take registers too
        warps = 8 if backward or channels > 128 else 4
        return Tile(64, streamed, depth, channels, whole, warps, 2, at_once=2 if channels <= 64 else 1)
    if how == "tf32":
        depth = _depth(c, 16 if backward and distance == "l2" else 32)
        return Tile(64, 32 if backward else 64, depth, _depth(c, 128), False, 8, 2, at_once=1)
    return Tile(64, 32, 16, _depth(c, 64), False, 8 if backward else 4, 2, 224, 1 if backward else 2)


def _splits(owners: int, streamed: int, batch: int, tile: Tile) -> int:
    """Parts of the stream, by the shape alone: enough programs, and no part without a tile."""
    return parts(cdiv(owners, tile.owners) * batch, MULTIPROCESSORS * tile.at_once, cdiv(streamed, tile.streamed))


class _Rows(NamedTuple):
    """Both sides as the sweeps take them."""

    x: Tensor
    y: Tensor
    x_sweep: Tensor  # with positions innermost for l1
    y_sweep: Tensor
    x_norm: Tensor
    y_norm: Tensor
    distance: str
    how: str
    half: bool
    wide: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        b, n, c = self.x.shape
        return b, n, self.y.shape[1], c


def _norm(x: Tensor) -> Tensor:
    b, n, c = x.shape
    norm = torch.empty((b, n), dtype=torch.float32, device=x.device)
    if norm.numel():
        _norms[(cdiv(b * n, ROWS),)](x, norm, b * n, C=c, BLOCK_R=ROWS, BLOCK_K=_depth(c, 64), num_warps=4)
    return norm


def _rows(x: Tensor, y: Tensor, distance: str) -> _Rows:
    x, y = x.contiguous(), y.contiguous()
    sides = (x.mT.contiguous(), y.mT.contiguous()) if distance == "l1" else (x, y)
    unused = x.new_empty(1, dtype=torch.float32)
    norms = (_norm(x), _norm(y)) if distance == "l2" else (unused, unused)
    return _Rows(x, y, *sides, *norms, distance, precision(x), x.dtype is not torch.float32, wide(x))


class _Prior(NamedTuple):
    rows: Tensor
    columns: Tensor
    weight: float
    there: bool

    @property
    def sizes(self) -> tuple[int, int]:
        return self.rows.shape[-1], self.columns.shape[-1]


def _prior_of(prior_rows: Tensor | None, prior_columns: Tensor | None, weight: float, like: Tensor) -> _Prior:
    if prior_rows is None or prior_columns is None:
        return _Prior(like, like, 0.0, False)
    return _Prior(prior_rows.contiguous(), prior_columns.contiguous(), weight, True)


def _extreme(
    rows: _Rows,
    prior: _Prior,
    statistics: Tensor,
    nearest: Tensor,
    log_sum: Tensor,
    scale: float,
    eps: float,
    least: bool,
    columns: bool,
    value: Tensor,
    index: Tensor,
    stride: int,
    poison: Tensor,
) -> None:
    """_best and its join."""
    b, n, m, c = rows.sizes
    with_prior = prior.there and not least
    score = "least" if least else "prior" if with_prior else "greatest"
    tile = _best_tile(rows.how, rows.half, rows.distance, c, score, hopper(rows.x.device))
    tile = tile._replace(**TUNABLE[score].now)
    owners, streamed = (m, n) if columns else (n, m)
    splits = _splits(owners, streamed, b, tile)
    part = torch.empty((b, splits, owners), dtype=torch.float32, device=rows.x.device)
    at = torch.empty((b, splits, owners), dtype=torch.int32, device=rows.x.device)
    _best[(cdiv(owners, tile.owners) * splits, b)](
        rows.x_sweep,
        rows.y_sweep,
        rows.x_norm,
        rows.y_norm,
        prior.rows,
        prior.columns,
        statistics,
        nearest,
        log_sum,
        part,
        at,
        n,
        m,
        *prior.sizes,
        splits,
        scale,
        eps,
        prior.weight,
        C=c,
        DISTANCE=rows.distance,
        NEAREST=least,
        COLUMNS=columns,
        PRIOR=with_prior,
        WHOLE=bool(tile.whole),
        PRECISION=rows.how,
        WIDE=rows.wide,
        BLOCK_O=tile.owners,
        BLOCK_S=tile.streamed,
        BLOCK_K=tile.depth,
        **tile.options,
    )
    _pick[(cdiv(owners, 128), b)](
        part,
        at,
        value,
        index,
        poison,
        owners,
        stride,
        splits,
        NEAREST=least,
        LOG=not with_prior,
        BLOCK=128,
        num_warps=4,
    )


def _sweep(
    rows: _Rows,
    statistics: Tensor,
    nearest: Tensor,
    scale: float,
    eps: float,
    columns: bool,
    sums: bool,
    backward: tuple[Tensor, ...] | None,
    sources: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """_attend: the parts of the masses, the moments and the sums, and how many parts."""
    b, n, m, c = rows.sizes
    tile = _attend_tile(rows.how, rows.half, rows.distance, c, sums, backward is not None, hopper(rows.x.device))
    tile = tile._replace(**TUNABLE["backward" if backward else "sums" if sums else "mass"].now)
    owners, streamed = (m, n) if columns else (n, m)
    splits = _splits(owners, streamed, b, tile)
    mass = torch.empty((b, splits, owners), dtype=torch.float32, device=rows.x.device)
    moment = mass if backward else torch.empty_like(mass)
    out = torch.empty((b, splits, owners, c), dtype=torch.float32, device=rows.x.device) if sums else mass
    rate, top, listed, count, winner, pull = backward or (mass,) * 6
    _attend[(cdiv(owners, tile.owners) * splits, b, max(1, cdiv(c, tile.channels)) if sums else 1)](
        rows.x_sweep,
        rows.y_sweep,
        rows.x,
        rows.y,
        rows.x_norm,
        rows.y_norm,
        statistics,
        nearest,
        rate,
        top,
        listed,
        count,
        winner,
        pull,
        mass,
        moment,
        out,
        n,
        m,
        splits,
        scale,
        eps,
        C=c,
        DISTANCE=rows.distance,
        COLUMNS=columns,
        BACKWARD=backward is not None,
        SUM=sums,
        SOURCES=sources,
        WHOLE=bool(tile.whole),
        PRECISION=rows.how,
        WIDE=rows.wide,
        BLOCK_O=tile.owners,
        BLOCK_S=tile.streamed,
        BLOCK_K=tile.depth,
        BLOCK_C=tile.channels,
        **tile.options,
    )
    return mass, moment, out, splits


def contextual_similarity(
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value, winner, statistics, nearest, mean) of genfast::contextual_similarity."""
    b, n, c = x.shape
    check_samples("contextual_similarity", b)
    m = y.shape[1]
    sources = over == "sources"
    owners = m if sources else n

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    value, winner = empty(b, owners), empty(b, owners, dtype=torch.int64)
    statistics, nearest, log_sum = empty(b, 3, n), empty(b, n, dtype=torch.int64), empty(b, n)
    mean = empty(b, n, c) if keep_mean else empty(0)
    if not b:
        return value, winner, statistics, nearest, mean
    rows, scale = _rows(x, y, distance), 1.0 / bandwidth
    prior = _prior_of(prior_rows, prior_columns, prior_weight, rows.x)
    _extreme(rows, prior, statistics, nearest, log_sum, scale, eps, True, False, statistics, nearest, 3 * n, log_sum)
    mass, moment, out, splits = _sweep(rows, statistics, nearest, scale, eps, False, keep_mean, None, sources)
    by_nearest = not sources and not prior.there
    _finish[(cdiv(n, ROWS), b)](
        mass,
        moment,
        out,
        rows.y,
        statistics,
        log_sum,
        nearest,
        value,
        winner,
        mean,
        n,
        m,
        splits,
        scale,
        eps,
        C=c,
        TARGETS=by_nearest,
        MEAN=keep_mean,
        BLOCK_R=ROWS,
        BLOCK_C=_depth(c, 32),
        num_warps=4,
    )
    if not by_nearest:
        # A maximum passes over what is not a number, which eager would return.
        poison = (log_sum - log_sum).sum(1)
        _extreme(rows, prior, statistics, nearest, log_sum, scale, eps, False, sources, value, winner, owners, poison)
    return value, winner, statistics, nearest, mean


def _grouped(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions of index (B, K) in the order of their values, and where each of ``size`` values starts."""
    values, order = index.sort(dim=1, stable=True)
    wanted = torch.arange(size + 1, device=index.device).expand(index.shape[0], -1).contiguous()
    return order, torch.searchsorted(values, wanted)


def _listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The places of what is set, in order and first, and how many."""
    return (~flags).to(torch.uint8).sort(dim=1, stable=True)[1], flags.sum(1)


def contextual_similarity_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    value: Tensor,
    winner: Tensor,
    statistics: Tensor,
    nearest: Tensor,
    mean: Tensor,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dy) of genfast::contextual_similarity_backward; an empty tensor for each that is not needed."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format) if need_y else y.new_empty(0)
    if not x.shape[0] or not (need_x or need_y):
        return dx, dy
    rows, scale, sources = _rows(x, y, distance), 1.0 / bandwidth, over == "sources"
    b, n, m, c = rows.sizes
    prior = _prior_of(prior_rows, prior_columns, prior_weight, rows.x)
    grad, value, winner, statistics, nearest, mean = (
        t.contiguous() for t in (grad, value, winner, statistics, nearest, mean)
    )
    order, starts = _grouped(winner, n if sources else m) if sources or need_y else (winner, winner)
    pull = torch.empty_like(value)
    rate, swept_rate, toward, toward_columns = (
        torch.empty((b, n), dtype=torch.float32, device=x.device) for _ in range(4)
    )
    _share[(cdiv(n, ROWS), b)](
        grad,
        value,
        winner,
        order,
        starts,
        prior.rows,
        prior.columns,
        statistics,
        nearest,
        rate,
        swept_rate,
        pull,
        toward,
        toward_columns,
        n,
        m,
        *prior.sizes,
        scale,
        eps,
        prior.weight,
        SOURCES=sources,
        PRIOR=prior.there,
        BLOCK_R=ROWS,
        BLOCK_E=ENTRIES if sources else 1,
        num_warps=4,
    )
    active = rate != 0
    kept = mean.numel() > 0
    block = _depth(c, 256) if distance != "l1" else _depth(c, 64)
    grid = max(1, cdiv(c, block))
    top = swept_rate.abs().amax().clamp_min(1e-30)

    def side(columns: bool, gradient: Tensor) -> None:
        swept = active & (statistics[:, 0] == 0) if kept and not columns else active
        listed, count = _listed(swept)
        pulls = pull.clone() if need_x and need_y else pull
        mass, _, out, splits = _sweep(
            rows,
            statistics,
            nearest,
            scale,
            eps,
            columns,
            True,
            (swept_rate, top, listed, count, winner, pulls),
            sources,
        )
        near = _grouped(nearest, m) if columns else (nearest, nearest)
        own, other = (rows.y, rows.x) if columns else (rows.x, rows.y)
        _gradient[(cdiv(own.shape[1], OWNERS), b, grid)](
            own,
            other,
            gradient,
            order,
            starts,
            winner,
            pulls,
            *near,
            nearest,
            toward_columns if columns else toward,
            statistics,
            rate,
            swept_rate,
            top,
            swept.to(torch.int32),
            mass,
            out,
            mean,
            own.shape[1],
            other.shape[1],
            splits,
            C=c,
            DISTANCE=distance,
            COLUMNS=columns,
            LISTED=columns != sources,
            MEAN=kept and not columns,
            BLOCK_R=OWNERS,
            BLOCK_E=ENTRIES,
            BLOCK_C=block,
            num_warps=4,
        )

    if need_x:
        side(False, dx)
    if need_y:
        side(True, dy)
    return dx, dy


def _variants() -> list[Aot]:
    found = []
    floats = dict.fromkeys(
        ("x_norm", "y_norm", "prior_rows", "prior_columns", "statistics", "log_sum", "value", "poison"), "*fp32"
    )
    floats |= dict.fromkeys(
        ("part", "rate", "rate_top", "swept_rate", "toward", "toward_columns", "pull", "mass", "moment", "out", "mean"),
        "*fp32",
    )
    floats |= {"norm": "*fp32"} | dict.fromkeys(("scale", "eps", "weight"), "fp32")
    ints = dict.fromkeys(("rows", "count", "winner", "order", "starts", "near_order", "near_starts", "nearest"), "*i64")
    ints |= {"index": "*i64", "part_index": "*i32", "swept": "*i32"}

    def add(
        label: str, kernel: Any, kind: str, launch: dict[str, int], types: dict[str, str] | None = None, **base: Any
    ) -> None:
        known = (
            floats | ints | dict.fromkeys(("x", "y", "x_rows", "y_rows", "own", "other"), f"*{kind}") | (types or {})
        )
        own = {name: known[name] for name in kernel.arg_names if name in known}
        found.append(variant(f"{label} {kind}", kernel, own, base, ("splits",), **launch))

    for kind in ("fp32", "bf16", "fp16"):
        half = kind != "fp32"
        for how in ("ieee",) if half else ("ieee", "tf32"):
            for distance in DISTANCES:
                if (distance == "l1" and how == "tf32") or (distance != "cosine" and kind == "fp16"):
                    continue
                for c in (64, 256, 512) if distance == "cosine" and kind == "bf16" else (256,):
                    base = dict(C=c, DISTANCE=distance, PRECISION=how, WIDE=False)
                    about = f"{distance} {c} {how}"
                    for nearest, columns, prior in ((1, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)):
                        if prior and c != 256:
                            continue
                        t = _best_tile(how, half, distance, c, "least" if nearest else "prior" if prior else "greatest")
                        blocks = dict(BLOCK_O=t.owners, BLOCK_S=t.streamed, BLOCK_K=t.depth, WHOLE=t.whole)
                        what = "least" if nearest else f"greatest{' by column' * columns}{', prior' * prior}"
                        ends = dict(NEAREST=bool(nearest), COLUMNS=bool(columns), PRIOR=bool(prior))
                        add(f"{what} {about}", _best, kind, t.options, {"index": "*i32"}, **base, **ends, **blocks)
                    for columns, backward, sums in ((0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)):
                        if distance == "l1" and sums and not backward:
                            continue
                        t = _attend_tile(how, half, distance, c, bool(sums), bool(backward))
                        blocks = dict(
                            BLOCK_O=t.owners, BLOCK_S=t.streamed, BLOCK_K=t.depth, BLOCK_C=t.channels, WHOLE=t.whole
                        )
                        ends = dict(COLUMNS=bool(columns), BACKWARD=bool(backward), SUM=bool(sums), SOURCES=True)
                        what = f"{'columns' if columns else 'rows'}{' back' * backward}{' sums' * sums}"
                        add(f"{what} {about}", _attend, kind, t.options, None, **base, **ends, **blocks)
        for distance in DISTANCES if kind == "fp32" else ("cosine",):
            for columns in (False, True):
                ends = dict(
                    C=256, DISTANCE=distance, COLUMNS=columns, LISTED=not columns, MEAN=not columns and distance != "l1"
                )
                block = 64 if distance == "l1" else 256
                about = f"{distance} of {'y' if columns else 'x'}"
                types = {"grad": f"*{kind}"}
                add(
                    about,
                    _gradient,
                    kind,
                    {"num_warps": 4},
                    types,
                    **ends,
                    BLOCK_R=OWNERS,
                    BLOCK_E=ENTRIES,
                    BLOCK_C=block,
                )
        add("norms", _norms, kind, {"num_warps": 4}, None, C=256, BLOCK_R=ROWS, BLOCK_K=64)
    for nearest in (False, True):
        add(
            "nearest" if nearest else "winner",
            _pick,
            "fp32",
            {"num_warps": 4},
            None,
            NEAREST=nearest,
            LOG=True,
            BLOCK=128,
        )
    for targets in (False, True):
        ends = dict(C=256, TARGETS=targets, MEAN=True, BLOCK_R=ROWS, BLOCK_C=32)
        add("targets" if targets else "sources", _finish, "fp32", {"num_warps": 4}, None, **ends)
        ends = dict(SOURCES=not targets, PRIOR=True, BLOCK_R=ROWS, BLOCK_E=1 if targets else ENTRIES)
        add("targets" if targets else "sources", _share, "fp32", {"num_warps": 4}, {"grad": "*fp32"}, **ends)
    return found


AOT = _variants()
