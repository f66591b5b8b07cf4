"""Activation normalisation (Glow 1807.03039 sec. 3.1): y = s x + b per channel, logdet = S sum log|s|.

x (N, C, S), s and b (C,). The forward reads x and writes y (8 bytes an element in float32); the backward reads grad_y and
x, writes dx (12) and sums grad s and grad b of its tile in the same pass. Bound by memory bandwidth. The partial sums are
added in a fixed order by a second, tiny reduction; the log-determinant is a sum over C numbers.

A program takes a tile of positions x channels, longest along whichever is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, View, cdiv, next_power_of_2, output, signature, view, wide


@triton.jit
def _tile(C, S, P, BC: tl.constexpr, BP: tl.constexpr):
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    inside = (p < P)[:, None] & (c < C)[None, :]
    return c, p // S, p % S, inside


@triton.jit
def _forward(
    x, mul, add, y, xn, xc, xs, yn, yc, ys, C, S, P, BC: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    c, n, s, inside = _tile(C, S, P, BC, BP)
    m = tl.load(mul + c, mask=c < C, other=0)[None, :]
    a = tl.load(add + c, mask=c < C, other=0)[None, :]
    value = tl.load(x + (n * xn + s * xs)[:, None] + (c * xc)[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(y + (n * yn + s * ys)[:, None] + (c * yc)[None, :], (value * m + a).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y, x, mul, dx, partial, gn, gc, gs, xn, xc, xs, yn, yc, ys, C, S, P, BC: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    c, n, s, inside = _tile(C, S, P, BC, BP)
    m = tl.load(mul + c, mask=c < C, other=0)[None, :]
    d = tl.load(grad_y + (n * gn + s * gs)[:, None] + (c * gc)[None, :], mask=inside, other=0).to(tl.float32)
    value = tl.load(x + (n * xn + s * xs)[:, None] + (c * xc)[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(dx + (n * yn + s * ys)[:, None] + (c * yc)[None, :], (d * m).to(dx.dtype.element_ty), mask=inside)
    to = partial + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(to, tl.sum(d * value, axis=0), mask=c < C)
    tl.store(to + C, tl.sum(d, axis=0), mask=c < C)


def _blocks(a: View) -> tuple[int, int]:
    """Channels and positions of a tile of at most 2048 elements."""
    channels = min(next_power_of_2(a.c), 128 if a.channels_last else 4)
    return channels, 2048 // channels


def actnorm(x: Tensor, scale: Tensor, bias: Tensor, log_scale: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of genfast::actnorm."""
    y, a = output(x), view(x)
    s, b = scale.float(), bias.float()
    log_s = s if log_scale else s.abs().log()
    s = s.exp() if log_scale else s
    mul, add = (1 / s, -b / s) if inverse else (s, b)
    logdet = ((-a.s if inverse else a.s) * log_s.sum()).to(wide(x.dtype)).expand(a.n).clone()
    if x.numel():
        channels, positions = _blocks(a)
        _forward[(cdiv(a.n * a.s, positions), cdiv(a.c, channels))](
            a.data, mul, add, y, *a.strides, *view(y).strides, a.c, a.s, a.n * a.s, BC=channels, BP=positions
        )
    return y, logdet


def actnorm_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, x: Tensor, scale: Tensor, bias: Tensor, log_scale: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dbias) of genfast::actnorm_backward."""
    dx, a = output(x), view(x)
    s, b = scale.float().exp() if log_scale else scale.float(), bias.float()
    sums = torch.zeros((2, a.c), device=x.device)
    if grad_y is None:
        dx.zero_()
    elif x.numel():
        channels, positions = _blocks(a)
        g, tiles = view(grad_y), cdiv(a.n * a.s, positions)
        partial = torch.empty((tiles, 2, a.c), device=x.device)
        _backward[(tiles, cdiv(a.c, channels))](
            g.data, a.data, 1 / s if inverse else s, dx, partial, *g.strides, *a.strides, *view(dx).strides, a.c, a.s,
            a.n * a.s, BC=channels, BP=positions,
        )  # fmt: skip
        sums = partial.sum(0)
    g_logdet = 0 if grad_logdet is None else grad_logdet.float().sum() * a.s
    if inverse:  # the sums are over the input y of x = (y - b) / s
        dlog_s, db = -((sums[0] - b * sums[1]) / s + g_logdet), -sums[1] / s
    else:
        dlog_s, db = sums[0] * s + g_logdet, sums[1]
    return dx, (dlog_s if log_scale else dlog_s / s).to(scale.dtype), db.to(bias.dtype)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = {k: f"*{kind}" for k in ("x", "y", "grad_y", "dx")} | {k: "*fp32" for k in ("mul", "add", "partial")}
        for channels in (4, 128):
            base = dict(BC=channels, BP=2048 // channels)
            for kernel in (_forward, _backward):
                found.append(Aot(f"{kind} tile of {channels} channels", kernel, signature(kernel, base, pointers), base))
    return found


AOT = _variants()
