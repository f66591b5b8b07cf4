"""Points between real and generated samples (WGAN-GP 1704.00028, algorithm 1): y_n = e_n real_n + (1 - e_n) fake_n.

    backward  d real = e g, d fake = (1 - e) g, d e = sum g (real - fake) over the sample

real, fake, y (N, D) with D the whole sample, e (N,). Fused: the spread of e over its sample, both products and their
sum; backward, in one read of g, whichever of the three is wanted. Forward 12 bytes an element in float32, backward 12
for the two gradients and 8 more for e's. Three FLOPs: bound by memory bandwidth. Sums: one partial per tile, added in
tile order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, cdiv, options, tiled_variant, tiles_choice, view

# Of a tile its elements and those of a thread.
TUNABLE = {way: tiles_choice(dict(tile=2048, each=16)) for way in ("forward", "backward")}


class Rows(NamedTuple):
    """N rows of ``size`` dense elements, ``stride`` apart."""

    data: Tensor
    n: int
    size: int
    stride: int

    @property
    def far(self) -> bool:
        return self.size >= 2**31 - 2**16  # no tile is as large


def rows(x: Tensor, form: torch.memory_format) -> Rows:
    """``x`` with each sample dense in the given order; copied only where it is not."""
    v = view(x)
    dense = (v.s == 1 or v.s_stride == 1) and (v.c == 1 or v.c_stride == v.s)
    if form is not torch.contiguous_format:
        dense = (v.c == 1 or v.c_stride == 1) and (v.s == 1 or v.s_stride == v.c)
    if not dense:
        return rows(x.contiguous(memory_format=form), form)
    return Rows(v.data, v.n, v.c * v.s, v.n_stride)


def block(size: int, choice: Mapping[str, int]) -> int:
    return min(choice["tile"], triton.next_power_of_2(size))


@triton.jit
def place(tiles, BLOCK: tl.constexpr, FAR: tl.constexpr):
    """This program's sample and its elements."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles
    if FAR:
        first = first.to(tl.int64)
    return n, first * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward(real, fake, epsilon, y, rn, fn, D, tiles, FAR: tl.constexpr, BLOCK: tl.constexpr):
    n, i = place(tiles, BLOCK, FAR)
    e = tl.load(epsilon + n).to(tl.float32)
    r = tl.load(real + n * rn + i, mask=i < D, other=0).to(tl.float32)
    f = tl.load(fake + n * fn + i, mask=i < D, other=0).to(tl.float32)
    tl.store(y + n * D + i, (e * r + (1 - e) * f).to(y.dtype.element_ty), mask=i < D)


@triton.jit
def _backward(
    grad,
    real,
    fake,
    epsilon,
    grad_real,
    grad_fake,
    partial,
    gn,
    rn,
    fn,
    D,
    tiles,
    REAL: tl.constexpr,
    FAKE: tl.constexpr,
    EPSILON: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, i = place(tiles, BLOCK, FAR)
    e = tl.load(epsilon + n).to(tl.float32)
    g = tl.load(grad + n * gn + i, mask=i < D, other=0).to(tl.float32)
    if REAL:
        tl.store(grad_real + n * D + i, (e * g).to(grad_real.dtype.element_ty), mask=i < D)
    if FAKE:
        tl.store(grad_fake + n * D + i, ((1 - e) * g).to(grad_fake.dtype.element_ty), mask=i < D)
    if EPSILON:
        r = tl.load(real + n * rn + i, mask=i < D, other=0).to(tl.float32)
        f = tl.load(fake + n * fn + i, mask=i < D, other=0).to(tl.float32)
        tl.store(partial + tl.program_id(0), tl.sum(g * (r - f), axis=0))


def interpolate(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """y of genfast::interpolate."""
    form = memory_format(real)
    y = torch.empty_like(real, memory_format=form)
    if not y.numel():
        return y
    r, f = rows(real, form), rows(fake, form)
    choice = TUNABLE["forward"].of(real.element_size())
    size = block(r.size, choice)
    tiles = cdiv(r.size, size)
    _forward[(r.n * tiles,)](
        r.data,
        f.data,
        epsilon.contiguous(),
        y,
        r.stride,
        f.stride,
        r.size,
        tiles,
        FAR=r.far,
        BLOCK=size,
        **options(size, r.far, each=choice["each"]),
    )
    return y


def interpolate_backward(
    grad: Tensor, real: Tensor, fake: Tensor, epsilon: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(d real, d fake, d epsilon) of genfast::interpolate_backward, empty where not wanted."""
    form = memory_format(real)
    dreal = torch.empty_like(real, memory_format=form) if wanted[0] else real.new_empty(0)
    dfake = torch.empty_like(fake, memory_format=form) if wanted[1] else fake.new_empty(0)
    if not real.numel():
        return dreal, dfake, epsilon.new_zeros(epsilon.shape if wanted[2] else 0)
    g, r, f = rows(grad, form), rows(real, form), rows(fake, form)
    choice = TUNABLE["backward"].of(real.element_size())
    size = block(r.size, choice)
    tiles = cdiv(r.size, size)
    partial = torch.empty((r.n, tiles) if wanted[2] else 0, dtype=torch.float32, device=real.device)
    _backward[(r.n * tiles,)](
        g.data,
        r.data,
        f.data,
        epsilon.contiguous(),
        dreal,
        dfake,
        partial,
        g.stride,
        r.stride,
        f.stride,
        r.size,
        tiles,
        REAL=wanted[0],
        FAKE=wanted[1],
        EPSILON=wanted[2],
        FAR=r.far,
        BLOCK=size,
        **options(size, r.far, each=choice["each"]),
    )
    return dreal, dfake, partial.sum(1).to(epsilon.dtype) if wanted[2] else epsilon.new_empty(0)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = ("real", "fake", "y", "grad", "grad_real", "grad_fake")
        types = dict.fromkeys(pointers, f"*{kind}") | {"epsilon": "*fp32", "partial": "*fp32"}
        made = functools.partial(tiled_variant, TUNABLE, kind, types)
        base = dict(FAR=False)
        found.append(made("plain", _forward, (), **base))
        found.append(made("far", _forward, None, **(base | dict(FAR=True))))
        found.append(made("all gradients", _backward, (), **(base | dict(REAL=True, FAKE=True, EPSILON=True))))
        found.append(made("real's gradient", _backward, (), **(base | dict(REAL=True, FAKE=False, EPSILON=False))))
        found.append(
            made("all gradients, far", _backward, None, **(base | dict(REAL=True, FAKE=True, EPSILON=True, FAR=True)))
        )
    return found


AOT = _variants()
