"""Spectral normalisation (SN-GAN 1802.05957, algorithm 1): v = n(W^T u), u = n(W v), sigma = u^T W v, W / sigma.

    backward  with u and v constant: dW = G / sigma + (g_sigma - <G, W> / sigma^2) u v^T

W a dense array (a, h, b), which is the matrix of h rows and a b columns. Two launches a product: one sums tiles over
PARTS parts of the long axis, one program then adds the parts, takes the norm and divides by it; what it divided by
gives sigma. W is read twice an iteration and once for the scaling (16 bytes an element in float32 with one iteration);
the backward reads G twice, W once and writes dW (16). 4 FLOPs an element and iteration: bound by memory bandwidth, of
the L2 where W fits.
No atomics: parts depend on the shape alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genfast._spectral_axes import Axes, dense, from_memory, to_memory

from ._common import TILE, Aot, cdiv, options, variant

PARTS = 16
ROWS, COLUMNS = 16, 64  # of a product's tile


@triton.jit
def _product(w, x, partial, H, B, R, K, per_part, BY_H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part p of R sums over K terms: rows h and columns j (BY_H), or rows j and columns h; element (h, j) lies at
    (j // B) H B + h B + j % B."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    if BY_H:
        at_row = r.to(tl.int64) * B
    else:
        at_row = (r // B).to(tl.int64) * H * B + r % B
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    last = tl.minimum((part + 1) * per_part, K)
    for first in range(part * per_part, last, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        if BY_H:
            at = (k // B).to(tl.int64) * H * B + k % B
        else:
            at = k.to(tl.int64) * B
        inside = (r[:, None] < R) & (k[None, :] < last)
        tile = tl.load(w + at_row[:, None] + at[None, :], mask=inside, other=0).to(tl.float32)
        total += tile * tl.load(x + k, mask=k < last, other=0)[None, :]
    tl.store(partial + part.to(tl.int64) * R + r, tl.sum(total, axis=1), mask=r < R)


@triton.jit
def _normalise(partial, vector, sigma, R, parts, eps, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """x, the sum of its parts: vector = x / max(|x|, eps) and sigma = vector . x; with KEEP the vector is given."""
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, R, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.zeros((BLOCK,), dtype=tl.float32)
        for p in range(parts):
            x += tl.load(partial + p * R + i, mask=i < R, other=0)
        if KEEP:
            square += x * tl.load(vector + i, mask=i < R, other=0)
        else:
            square += x * x
            tl.store(partial + i, x, mask=i < R)  # over the first part, which this program alone reads
    total = tl.sum(square, axis=0)
    if KEEP:
        tl.store(sigma, total)
    else:
        norm = tl.sqrt(total)
        floor = tl.maximum(norm, eps)
        tl.store(sigma, norm * (norm / floor))
        tl.debug_barrier()
        for first in range(0, R, BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(vector + i, tl.load(partial + i, mask=i < R, other=0) / floor, mask=i < R)


@triton.jit
def _scale(w, sigma, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(w + i, mask=i < size, other=0).to(tl.float32)
    tl.store(out + i, (x / tl.load(sigma)).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _inner(g, w, partial, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(g + i, mask=i < size, other=0).to(tl.float32)
    b = tl.load(w + i, mask=i < size, other=0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(a * b, axis=0))


@triton.jit
def _outer(g, u, v, sigma, along, out, size, H, B, BLOCK: tl.constexpr):
    """g / sigma + along u v^T."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row = i // B
    left = tl.load(u + row % H, mask=inside, other=0).to(tl.float32)
    right = tl.load(v + row // H * B + i % B, mask=inside, other=0).to(tl.float32)
    d = tl.load(g + i, mask=inside, other=0).to(tl.float32)
    found = d / tl.load(sigma) + tl.load(along) * left * right
    tl.store(out + i, found.to(out.dtype.element_ty), mask=inside)


def _multiply(
    w: Tensor, a: Axes, x: Tensor, vector: Tensor, sigma: Tensor, by_h: bool, eps: float, keep: bool = False
) -> None:
    """vector = n(W x) (by_h) or n(W^T x), and sigma."""
    columns = a.a * a.b
    rows, terms = (a.h, columns) if by_h else (columns, a.h)
    parts = min(PARTS, cdiv(terms, COLUMNS))
    per_part = cdiv(cdiv(terms, parts), COLUMNS) * COLUMNS
    parts = cdiv(terms, per_part)
    partial = torch.empty((parts, rows), dtype=torch.float32, device=w.device)
    _product[(cdiv(rows, ROWS), parts)](
        w, x, partial, a.h, a.b, rows, terms, per_part, BY_H=by_h, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4
    )
    _normalise[(1,)](partial, vector, sigma, rows, parts, eps, KEEP=keep, BLOCK=TILE, num_warps=4)


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor | None, iterations: int, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W / sigma, u, v, sigma) of genfast::spectral_norm."""
    w, a = dense(weight, dim)
    left = u.to(torch.float32, copy=True).contiguous()
    right = to_memory(v.to(torch.float32, copy=True), a).contiguous() if v is not None else left.new_empty(a.a * a.b)
    sigma = left.new_empty(())
    for _ in range(iterations):
        if v is not None:
            _multiply(w, a, right, left, sigma, True, eps)
        _multiply(w, a, left, right, sigma, False, eps)
        if v is None:
            _multiply(w, a, right, left, sigma, True, eps)
    if not iterations:
        _multiply(w, a, right, left, sigma, True, eps, keep=True)
    out = torch.empty_like(w)
    _scale[(cdiv(w.numel(), TILE),)](w, sigma, out, w.numel(), BLOCK=TILE, **options(TILE, False))
    return out, left.to(u.dtype), from_memory(right, a).to(u.dtype), sigma


def spectral_norm_backward(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor:
    """dW of genfast::spectral_norm_backward."""
    w, a = dense(weight, dim)
    g = torch.zeros_like(w) if grad is None else grad
    if g.stride() != w.stride():
        g = torch.empty_like(w).copy_(g)
    tiles = cdiv(w.numel(), TILE)
    partial = torch.empty(tiles, dtype=torch.float32, device=w.device)
    _inner[(tiles,)](g, w, partial, w.numel(), BLOCK=TILE, **options(TILE, False))
    sigma = sigma.float()
    along = -partial.sum() / sigma.square()
    if grad_sigma is not None:
        along = along + grad_sigma.float()
    out = torch.empty_like(w)
    _outer[(tiles,)](
        g,
        u.contiguous(),
        to_memory(v, a).contiguous(),
        sigma,
        along,
        out,
        w.numel(),
        a.h,
        a.b,
        BLOCK=TILE,
        **options(TILE, False),
    )
    return out


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("w", "g", "out"), f"*{kind}")
        types |= dict.fromkeys(("x", "partial", "vector", "sigma", "u", "v", "along"), "*fp32") | {"eps": "fp32"}

        def add(
            label: str, kernel: Any, ones: tuple[str, ...] | None, types: dict[str, str] = types, **constants: Any
        ) -> None:
            own = {name: types[name] for name in kernel.arg_names if name in types}
            found.append(variant(label, kernel, own, constants, ones, num_warps=4))

        for by_h in (True, False):
            base = dict(BY_H=by_h, ROWS=ROWS, COLUMNS=COLUMNS)
            for label, ones in (("rows dense", ()), ("columns dense", ("B",)), ("64-bit sizes", None)):
                add(f"{label} {'W v' if by_h else 'W^T u'} {kind}", _product, ones, **base)
        for ones, label in (((), "32-bit sizes"), (None, "64-bit sizes")):
            for kernel in (_scale, _inner, _outer):
                add(f"{label} {kind}", kernel, ones, BLOCK=TILE)
        if kind == "fp32":
            for keep in (False, True):
                add(f"{'kept' if keep else 'new'} vector", _normalise, (), KEEP=keep, BLOCK=TILE)
                add(f"{'kept' if keep else 'new'} vector, one part", _normalise, ("parts",), KEEP=keep, BLOCK=TILE)
    return found


AOT = _variants()
