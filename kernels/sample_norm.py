"""The Euclidean norm of each sample (WGAN-GP 1704.00028, equation 3): |x_n| = sqrt sum_i x_ni^2.

    backward  g x / |x|, zero where |x| is; g 2 x for the square

x (N, D) with D the whole sample, out (N,). Fused: square and sum; backward the quotient and the product. One pass each
way: 4 bytes an element in float32 forward, 8 backward. Squares are added in float64, where no float32 overflows or
    vanishes:
two conversions and FLOPs in float64 an element, which keeps up with memory also where the rate of float64 is 1/64.
Bound by memory bandwidth. A sample is cut into parts that depend on the shape alone; their sums are added in order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, Choice, cdiv, every, options, tiled_variant, tiles_choice
from .interpolate import block, place, rows

# Of a tile its elements and those of a thread; programs, about so many in all.
TUNABLE = {
    "forward": Choice(
        dict(tile=1024, each=8, programs=1024), every(tile=(512, 1024, 2048), each=(4, 8), programs=(1024, 4096, 16384))
    ),
    "backward": tiles_choice(dict(tile=2048, each=16)),
}


@triton.jit
def _forward(x, partial, xn, D, tiles, parts, FAR: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of the tiles part, part + parts, ... of a sample."""
    n = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    inner = tl.arange(0, BLOCK)
    if FAR:
        inner = inner.to(tl.int64)
    for k in range(part, tiles, parts):
        i = k * BLOCK + inner
        v = tl.load(x + n * xn + i, mask=i < D, other=0).to(tl.float64)
        total += v * v
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _backward(grad, x, norm, dx, xn, D, tiles, SQUARED: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr):
    n, i = place(tiles, BLOCK, FAR)
    g = tl.load(grad + n).to(tl.float32)
    v = tl.load(x + n * xn + i, mask=i < D, other=0).to(tl.float32)
    if SQUARED:
        found = 2 * g * v
    else:
        length = tl.load(norm + n).to(tl.float32)
        # x / |x| first: g / |x| may overflow where the product does not.
        found = tl.where(length == 0, 0.0, v / tl.where(length == 0, 1.0, length) * g)
    tl.store(dx + n * D + i, found.to(dx.dtype.element_ty), mask=i < D)


def sample_norm(x: Tensor, squared: bool) -> Tensor:
    """out of genfast::sample_norm."""
    if not x.numel():
        return torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    r = rows(x, memory_format(x))
    choice = TUNABLE["forward"].of(x.element_size())
    size = block(r.size, choice)
    tiles = cdiv(r.size, size)
    parts = min(tiles, max(1, choice["programs"] // r.n))
    partial = torch.empty((r.n, parts), dtype=torch.float64, device=x.device)
    _forward[(r.n * parts,)](
        r.data,
        partial,
        r.stride,
        r.size,
        tiles,
        parts,
        FAR=r.far,
        BLOCK=size,
        **options(size, r.far, each=choice["each"]),
    )
    total = partial.sum(1)
    return (total if squared else total.sqrt()).float()


def sample_norm_backward(x: Tensor, norm: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """dx of genfast::sample_norm_backward."""
    form = memory_format(x)
    dx = torch.empty_like(x, memory_format=form)
    if not x.numel():
        return dx
    r = rows(x, form)
    choice = TUNABLE["backward"].of(x.element_size())
    size = block(r.size, choice)
    tiles = cdiv(r.size, size)
    _backward[(r.n * tiles,)](
        grad.contiguous(),
        r.data,
        norm.contiguous(),
        dx,
        r.stride,
        r.size,
        tiles,
        SQUARED=squared,
        FAR=r.far,
        BLOCK=size,
        **options(size, r.far, each=choice["each"]),
    )
    return dx


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        types = {"x": f"*{kind}", "dx": f"*{kind}", "grad": "*fp32", "norm": "*fp32", "partial": "*fp64"}
        made = functools.partial(tiled_variant, TUNABLE, kind, types)
        base = dict(FAR=False)
        found.append(made("plain", _forward, (), **base))
        found.append(made("one part", _forward, ("parts",), **base))
        found.append(made("far", _forward, None, **(base | dict(FAR=True))))
        for squared in (False, True):
            found.append(made("squared" if squared else "plain", _backward, (), **(base | dict(SQUARED=squared))))
        found.append(made("far", _backward, None, **(base | dict(SQUARED=False, FAR=True))))
    return found


AOT = _variants()
