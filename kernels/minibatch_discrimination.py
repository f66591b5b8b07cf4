"""Minibatch discrimination's pairwise part (Salimans et al. 1606.03498, section 3.2), for each kernel b with
k_ij = exp(-sum_c |M_ic - M_jc|), s_ijc = sign(M_ic - M_jc):

    sums             o_i = sum_j k_ij
    backward         dM_ic = -sum_j (g_i + g_j) k_ij s_ijc
    second backward  of <V, dM>, with D_ij = sum_c s_ijc (V_ic - V_jc):
                     dg_i = -sum_j k_ij D_ij,  dM_ic = sum_j (g_i + g_j) k_ij D_ij s_ijc

M, V (N, B, C), g, o (N, B). A program takes rows i of one kernel b and walks over all j in tiles, so each sum is one
program's own: no atomics, and no array over pairs. It computes a pair twice, once from either side, where the C++
kernel
counts it for both: N^2 B (3 C + 10) FLOPs forward, against 4 N B C bytes, so bound by arithmetic. Inputs are copied
    with N
innermost. The gradients of a few features at a time stay in registers; beyond so many, programs recompute distances.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, cdiv, every, variant
from ._math import exp

# Rows i and rows j of a tile; features, at most so many hold their gradients in one program.
TUNABLE = {
    "forward": Choice(dict(size=32, warps=4), every(size=(16, 32, 64), warps=(1, 2, 4, 8))),
    "backward": Choice(dict(size=16, features=16, warps=4), every(size=(16, 32), features=(4, 8, 16), warps=(2, 4, 8))),
}
REGISTERS = 128  # of a thread of the backward, which the assembler does not grant of itself


@triton.jit
def _distances(m, t, base, i, j, N, C, SECOND: tl.constexpr, SIZE: tl.constexpr):
    """sum_c |M_ic - M_jc| and, with SECOND, D_ij."""
    distance = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    slope = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    at = base
    for _ in range(C):
        a = tl.load(m + at + i, mask=i < N, other=0).to(tl.float32)
        b = tl.load(m + at + j, mask=j < N, other=0).to(tl.float32)
        difference = a[:, None] - b[None, :]
        distance += tl.abs(difference)
        if SECOND:
            x = tl.load(t + at + i, mask=i < N, other=0).to(tl.float32)
            y = tl.load(t + at + j, mask=j < N, other=0).to(tl.float32)
            sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
            slope += sign * (x[:, None] - y[None, :])
        at += N
    return distance, slope


@triton.jit
def _forward(m, o, N, C, i_tiles, SELF: tl.constexpr, SIZE: tl.constexpr):
    b = (tl.program_id(0) // i_tiles).to(tl.int64)
    i = (tl.program_id(0) % i_tiles) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for first in range(0, N, SIZE):
        j = first + tl.arange(0, SIZE)
        distance, _ = _distances(m, m, b * C * N, i, j, N, C, False, SIZE)
        counts = (i[:, None] < N) & (j[None, :] < N)
        if not SELF:
            counts = counts & (i[:, None] != j[None, :])
        total += tl.where(counts, exp(-distance), 0.0)
    tl.store(o + b * N + i, tl.sum(total, axis=1), mask=i < N)


@triton.jit
def _backward(
    m, t, g, dg, dm, N, C, i_tiles, c_tiles, SECOND: tl.constexpr, SIZE: tl.constexpr, FEATURES: tl.constexpr
):
    """dm of FEATURES features; with SECOND of <t, dm>, and dg, which the programs of the first features write."""
    tile = tl.program_id(0) // c_tiles
    c_tile = tl.program_id(0) % c_tiles
    b = (tile // i_tiles).to(tl.int64)
    i = (tile % i_tiles) * SIZE + tl.arange(0, SIZE)
    c = c_tile * FEATURES + tl.arange(0, FEATURES)
    base = b * C * N
    at = base + c.to(tl.int64) * N
    mi = tl.load(m + at[None, :] + i[:, None], mask=(i[:, None] < N) & (c[None, :] < C), other=0).to(tl.float32)
    gi = tl.load(g + b * N + i, mask=i < N, other=0).to(tl.float32)
    total = tl.zeros((SIZE, FEATURES), dtype=tl.float32)
    total_g = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for first in range(0, N, SIZE):
        j = first + tl.arange(0, SIZE)
        distance, slope = _distances(m, t, base, i, j, N, C, SECOND, SIZE)
        k = tl.where((i[:, None] < N) & (j[None, :] < N), exp(-distance), 0.0)
        gj = tl.load(g + b * N + j, mask=j < N, other=0).to(tl.float32)
        if SECOND:
            k = k * slope
            total_g += k
        else:
            k = -k
        weight = (gi[:, None] + gj[None, :]) * k
        mj = tl.load(m + at[:, None] + j[None, :], mask=(c[:, None] < C) & (j[None, :] < N), other=0).to(tl.float32)
        difference = mi[:, :, None] - mj[None, :, :]
        sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
        total += tl.sum(sign * weight[:, None, :], axis=2)
    tl.store(dm + at[None, :] + i[:, None], total.to(dm.dtype.element_ty), mask=(i[:, None] < N) & (c[None, :] < C))
    if SECOND:
        first_features = i * 0 + c_tile == 0
        tl.store(dg + b * N + i, -tl.sum(total_g, axis=1).to(dg.dtype.element_ty), mask=(i < N) & first_features)


def _inner(x: Tensor) -> Tensor:
    """(N, B, ...) as (B, ..., N)."""
    return x.movedim(0, -1).contiguous()


def _outer(x: Tensor) -> Tensor:
    """Back to (N, B, ...), dense also where an axis of one element would leave other strides as they are."""
    return torch.empty((x.shape[-1], *x.shape[:-1]), dtype=x.dtype, device=x.device).copy_(x.movedim(-1, 0))


def pairwise_l1_kernel_sum(m: Tensor, include_self: bool) -> Tensor:
    """o of genfast::pairwise_l1_kernel_sum."""
    n, b, c = m.shape
    o = torch.empty((b, n), dtype=torch.float32, device=m.device)
    if n and b:
        size, warps = TUNABLE["forward"]["size"], TUNABLE["forward"]["warps"]
        tiles = cdiv(n, size)
        _forward[(b * tiles,)](_inner(m), o, n, c, tiles, SELF=include_self, SIZE=size, num_warps=warps)
    return _outer(o)


def _gradients(m: Tensor, grad: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor]:
    n, b, c = m.shape
    inner, g = _inner(m), _inner(grad)
    t = inner if tangent is None else _inner(tangent)
    dg, dm = torch.zeros_like(g), torch.empty_like(inner)
    if n and b:
        # With no feature at all, one tile still writes dg.
        choice = TUNABLE["backward"]
        features = min(choice["features"], triton.next_power_of_2(max(c, 1)))
        tiles, c_tiles = cdiv(n, choice["size"]), max(1, cdiv(c, features))
        _backward[(b * tiles * c_tiles,)](
            inner,
            t,
            g,
            dg,
            dm,
            n,
            c,
            tiles,
            c_tiles,
            SECOND=tangent is not None,
            SIZE=choice["size"],
            FEATURES=features,
            num_warps=choice["warps"],
            maxnreg=REGISTERS,
        )
    return _outer(dg), _outer(dm)


def pairwise_l1_kernel_sum_backward(m: Tensor, grad: Tensor) -> Tensor:
    """dm of genfast::pairwise_l1_kernel_sum_backward."""
    return _gradients(m, grad, None)[1]


def pairwise_l1_kernel_sum_second_backward(m: Tensor, grad: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """(dg, dm) of genfast::pairwise_l1_kernel_sum_second_backward."""
    return _gradients(m, grad, tangent)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("m", "t", "dm"), f"*{kind}") | {"o": "*fp32", "g": "*fp32", "dg": "*fp32"}

        def add(
            label: str, kernel: Any, ones: tuple[str, ...] | None, types: dict[str, str] = types, **constants: Any
        ) -> None:
            own = {name: types[name] for name in kernel.arg_names if name in types}
            launch = {"maxnreg": REGISTERS} if kernel is _backward else {}
            choice = TUNABLE[kernel.fn.__name__[1:]]
            constants["SIZE"] = choice["size"]
            found.append(variant(label, kernel, own, constants, ones, num_warps=choice["warps"], **launch))

        for ones, label in (((), "32-bit sizes"), (None, "64-bit sizes")):
            for include_self in (True, False):
                of = "all" if include_self else "others"
                add(f"{of}, {label} {kind}", _forward, ones, SELF=include_self)
            for second in (False, True):
                of = "second" if second else "first"
                for features in (TUNABLE["backward"]["features"], 8):
                    about = f"{of}, {features} features, {label} {kind}"
                    add(about, _backward, ones, SECOND=second, FEATURES=features)
    return found


AOT = _variants()
