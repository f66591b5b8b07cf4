"""What a modulated convolution (StyleGAN2 1912.04958 sec. 2.2, eq. 1-3) needs beside its convolution.

    channel_scale: y[n, c, s] = a[n, c] x[n, c, s] (+ noise[n, s]);  backward  dx = a d, da = sum_s d x, dnoise = sum_c
        d
    tap_energy:    q[r] = sum_k w[r, k]^2

x (N, C, S), a (N, C), noise (N or 1, S), w (O I, taps). The forward reads x and writes y (8 bytes an element in
float32), the backward reads d and x and writes dx (12) in one pass with both sums: a program takes some positions of
one sample, walks over channels, and writes a partial da, which the library adds up over position tiles in a fixed
order. tap_energy reads w once. All bound by memory bandwidth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TILE, Aot, cdiv, options, output, place, tile, tiles_choice, variant, view

TUNABLE = {"forward": tiles_choice()}
SPREAD = 512  # programs below which the backward splits channels over programs too, and adds dnoise up afterwards


@triton.jit
def _scale(
    x,
    scale,
    noise,
    y,
    xn,
    xc,
    xs,
    an,
    ac,
    zn,
    zs,
    yn,
    yc,
    ys,
    C,
    S,
    s_tiles,
    tiles,
    HAS_NOISE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, k, c, p = place(s_tiles, tiles, BLOCK_C, BLOCK_S, FAR)
    inside = (c < C) & (p < S)
    out = tl.load(x + n * xn + (c * xc + p * xs), mask=inside, other=0).to(tl.float32)
    out = out * tl.load(scale + n * an + c * ac, mask=c < C, other=0).to(tl.float32)
    if HAS_NOISE:
        out += tl.load(noise + n * zn + p * zs, mask=p < S, other=0).to(tl.float32)
    tl.store(y + n * yn + (c * yc + p * ys), out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scale_backward(
    grad_y,
    x,
    scale,
    dx,
    partial,
    dnoise,
    gn,
    gc,
    gs,
    xn,
    xc,
    xs,
    an,
    ac,
    yn,
    yc,
    ys,
    C,
    S,
    s_tiles,
    splits,
    HAS_NOISE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """partial (N, s_tiles, C); dnoise (N, splits, S)."""
    part = tl.program_id(0) % splits
    k = tl.program_id(0) // splits
    n = (k // s_tiles).to(tl.int64)
    p = ((k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    if FAR:
        p = p.to(tl.int64)
    across = tl.zeros((BLOCK_C, BLOCK_S), dtype=tl.float32)
    for first in range(part * BLOCK_C, C, splits * BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C))[:, None]
        if FAR:
            c = c.to(tl.int64)
        inside = (c < C) & (p < S)
        d = tl.load(grad_y + n * gn + (c * gc + p * gs), mask=inside, other=0).to(tl.float32)
        value = tl.load(x + n * xn + (c * xc + p * xs), mask=inside, other=0).to(tl.float32)
        a = tl.load(scale + n * an + c * ac, mask=c < C, other=0).to(tl.float32)
        tl.store(dx + n * yn + (c * yc + p * ys), (d * a).to(dx.dtype.element_ty), mask=inside)
        tl.store(partial + k.to(tl.int64) * C + c, tl.sum(d * value, axis=1)[:, None], mask=c < C)
        if HAS_NOISE:
            across += d
    if HAS_NOISE:
        tl.store(dnoise + (n * splits + part) * S + p, tl.sum(across, axis=0)[None, :], mask=p < S)


@triton.jit
def _energy(w, out, ROWS, TAPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in tl.static_range(0, TAPS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (r < ROWS)[:, None] & (k < TAPS)[None, :]
        value = tl.load(w + r[:, None] * TAPS + k[None, :], mask=inside, other=0).to(tl.float32)
        total += tl.sum(value * value, axis=1)
    tl.store(out + r, total, mask=r < ROWS)


def channel_scale(x: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
    """y of genfast::channel_scale."""
    y = output(x)
    if not x.numel():
        return y
    a, out = view(x), view(y)
    z = None if noise is None else view(noise)
    choice = TUNABLE["forward"]
    block_c, block_s = tile(a, choice["tile"])
    s_tiles = cdiv(a.s, block_s)
    tiles = cdiv(a.c, block_c) * s_tiles
    far = a.far or out.far
    noise_n, noise_s = (0, 0) if z is None else (z.n_stride if z.n > 1 else 0, z.s_stride)
    _scale[(a.n * tiles,)](
        a.data,
        scale,
        a.data if z is None else z.data,
        y,
        *a.strides,
        *scale.stride(),
        noise_n,
        noise_s,
        *out.strides,
        a.c,
        a.s,
        s_tiles,
        tiles,
        HAS_NOISE=z is not None,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far, each=choice["each"]),
    )
    return y


def channel_scale_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dnoise) of genfast::channel_scale_backward."""
    dx = output(x)
    n, channels = x.shape[:2]
    if not x.numel():
        return dx, torch.zeros_like(scale), x.new_empty(0) if noise is None else torch.zeros_like(noise)
    a, g, out = view(x), view(grad_y), view(dx)
    block_s = min(triton.next_power_of_2(a.s), 16 if a.walks_channels else 128)
    block_c = min(triton.next_power_of_2(a.c), TILE // block_s)
    s_tiles = cdiv(a.s, block_s)
    splits = min(cdiv(a.c, block_c), max(1, cdiv(SPREAD, n * s_tiles)))
    partial = torch.empty((n, s_tiles, channels), dtype=torch.float32, device=x.device)
    dnoise = torch.empty((n, splits, a.s) if noise is not None else 0, dtype=torch.float32, device=x.device)
    far = a.far or out.far or g.far
    _scale_backward[(n * s_tiles * splits,)](
        g.data,
        a.data,
        scale,
        dx,
        partial,
        dnoise,
        *g.strides,
        *a.strides,
        *scale.stride(),
        *out.strides,
        a.c,
        a.s,
        s_tiles,
        splits,
        HAS_NOISE=noise is not None,
        FAR=far,
        BLOCK_C=block_c,
        BLOCK_S=block_s,
        **options(block_c * block_s, far),
    )
    dscale = partial.sum(1).to(scale.dtype)
    if noise is None:
        return dx, dscale, x.new_empty(0)
    summed = dnoise.sum(1) if noise.shape[0] == n else dnoise.sum((0, 1))
    return dx, dscale, summed.reshape(noise.shape).to(noise.dtype)


def tap_energy(weight: Tensor) -> Tensor:
    """q of genfast::tap_energy."""
    out = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    taps = math.prod(weight.shape[2:])
    if not taps:
        return out.zero_()
    if out.numel():
        block_k = min(triton.next_power_of_2(taps), 64)
        block_r = TILE // block_k
        _energy[(cdiv(out.numel(), block_r),)](
            weight.contiguous(), out, out.numel(), TAPS=taps, BLOCK_R=block_r, BLOCK_K=block_k, **options(TILE, False)
        )
    return out


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = dict.fromkeys(("x", "y", "grad_y", "dx", "scale", "noise", "w"), f"*{kind}")
        pointers |= dict.fromkeys(("partial", "dnoise", "out"), "*fp32")

        def add(label: str, kernel: Any, ones: tuple[str, ...] | None, pointers: Any = pointers, **base: Any) -> None:
            types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
            found.append(variant(label, kernel, types, base, ones, **options(TILE, ones is None)))

        for noise in (False, True):
            label = f"{'noise ' if noise else ''}{kind}"
            base = dict(HAS_NOISE=noise, FAR=False)
            add(label, _scale, ("xs", "ys", "ac", "zs"), **base, BLOCK_C=1, BLOCK_S=1024)
            add(f"channels_last {label}", _scale, ("xc", "yc", "ac", "zs"), **base, BLOCK_C=64, BLOCK_S=16)
            add(label, _scale_backward, ("xs", "gs", "ys", "ac"), **base, BLOCK_C=8, BLOCK_S=128)
            add(f"channels_last {label}", _scale_backward, ("xc", "gc", "yc", "ac"), **base, BLOCK_C=64, BLOCK_S=16)
        add(f"3x3 {kind}", _energy, (), TAPS=9, BLOCK_R=64, BLOCK_K=16)
    far = dict(HAS_NOISE=True, FAR=True, BLOCK_C=8, BLOCK_S=128)
    add("any strides fp16", _scale, None, **far)
    add("any strides fp16", _scale_backward, None, **far)
    return found


AOT = _variants()
