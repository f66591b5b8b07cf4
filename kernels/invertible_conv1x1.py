"""Invertible 1x1 convolution (Glow 1807.03039 sec. 3.2): y = W x + b at every position, and its gradients.

x (N, C, S) may come, and y may go, as two halves of the channels, so that a chain of coupling steps neither splits nor
concatenates. An implicit product over the positions of all samples: 2 C FLOPs and 8 bytes (float32) an element, so bound
by memory bandwidth up to C of about 100 on tensor cores. The backward is the same kernel with W transposed, and
grad W = sum d x^T, a second pass over d and x in chunks of positions whose partial sums are added in a fixed order.

float32 products follow torch.backends.cuda.matmul.allow_tf32; half types multiply in their own type and add in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, cdiv, next_power_of_2, output, signature, view

POSITIONS = 64
GRAD_POSITIONS = 32


@triton.jit
def _halves(a, b, n, s, c, C, first, an, ac, as_, bn, bc, bs, rows, PAIR: tl.constexpr):
    """Positions x channels of two views that stand one behind the other."""
    inside = rows[:, None] & (c < first)[None, :]
    value = tl.load(a + (n * an + s * as_)[:, None] + (c * ac)[None, :], mask=inside, other=0)
    if PAIR:
        behind = rows[:, None] & ((c >= first) & (c < C))[None, :]
        other = tl.load(b + (n * bn + s * bs)[:, None] + ((c - first) * bc)[None, :], mask=behind, other=0)
        value = tl.where(behind, other, value)
    return value


@triton.jit
def _mix(
    x, x_b, weight, bias, y, y_b, xn, xc, xs, bn, bc, bs, yn, yc, ys, zn, zc, zs, wo, wi, C, S, P, first, split,
    PAIR: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    o = tl.program_id(1).to(tl.int64) * BO + tl.arange(0, BO)
    rows = p < P
    n = p // S
    s = p % S
    total = tl.zeros((BP, BO), dtype=tl.float32)
    for start in range(0, C, BI):
        i = start + tl.arange(0, BI).to(tl.int64)
        value = _halves(x, x_b, n, s, i, C, first, xn, xc, xs, bn, bc, bs, rows, PAIR)
        w = tl.load(weight + (i * wi)[:, None] + (o * wo)[None, :], mask=(i < C)[:, None] & (o < C)[None, :], other=0)
        if WIDE:
            value = value.to(tl.float32)
        total = tl.dot(value, w.to(value.dtype), total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + o, mask=o < C, other=0).to(tl.float32)[None, :]
    out = total.to(y.dtype.element_ty)
    tl.store(y + (n * yn + s * ys)[:, None] + (o * yc)[None, :], out, mask=rows[:, None] & (o < split)[None, :])
    if SPLIT:
        behind = rows[:, None] & ((o >= split) & (o < C))[None, :]
        tl.store(y_b + (n * zn + s * zs)[:, None] + ((o - split) * zc)[None, :], out, mask=behind)


@triton.jit
def _weight_grad(
    d, d_b, x, x_b, partial, dn, dc, ds, en, ec, es, xn, xc, xs, bn, bc, bs, C, S, P, split, first, chunk,
    PAIR_D: tl.constexpr, PAIR_X: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """One (BO, BI) block of grad W over `chunk` positions, and in the first column of blocks grad b behind it."""
    o = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    i = tl.program_id(1).to(tl.int64) * BI + tl.arange(0, BI)
    k = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BO, BI), dtype=tl.float32)
    column = tl.zeros((BO,), dtype=tl.float32)
    for start in range(k * chunk, k * chunk + chunk, BP):
        p = start + tl.arange(0, BP).to(tl.int64)
        rows = p < P
        n = p // S
        s = p % S
        grad = _halves(d, d_b, n, s, o, C, split, dn, dc, ds, en, ec, es, rows, PAIR_D)
        value = _halves(x, x_b, n, s, i, C, first, xn, xc, xs, bn, bc, bs, rows, PAIR_X)
        if WIDE:
            grad = grad.to(tl.float32)
            value = value.to(tl.float32)
        total = tl.dot(tl.trans(grad), value, total, input_precision=PRECISION)
        column += tl.sum(grad.to(tl.float32), axis=0)
    at = partial + k * C * (C + 1)
    tl.store(at + (o * (C + 1))[:, None] + i[None, :], total, mask=(o < C)[:, None] & (i < C)[None, :])
    if tl.program_id(1) == 0:
        tl.store(at + o * (C + 1) + C, column, mask=o < C)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _wide(x: Tensor) -> bool:
    """The interpreter, which is NumPy, has no product of bfloat16; the same numbers in float32."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _block(channels: int) -> int:
    return 16 if channels <= 16 else 32


def _warps(block: int) -> int:
    """Enough threads that no tile spills its addresses."""
    return 4 if block == 16 else 8


def _launch_mix(
    x: Tensor, x_b: Tensor | None, weight: Tensor, transposed: bool, bias: Tensor | None, y: Tensor, y_b: Tensor, split: int
) -> None:
    a, out = view(x), view(y)
    b = a if x_b is None else view(x_b)
    rest = out if split == weight.shape[0] else view(y_b)
    channels, block = weight.shape[0], _block(weight.shape[0])
    wo, wi = (weight.stride(1), weight.stride(0)) if transposed else (weight.stride(0), weight.stride(1))
    _mix[(cdiv(a.n * a.s, POSITIONS), cdiv(channels, block))](
        a.data, b.data, weight, weight if bias is None else bias, y, y_b, *a.strides, *b.strides, *out.strides, *rest.strides,
        wo, wi, channels, a.s, a.n * a.s, a.c, split,
        PAIR=x_b is not None, SPLIT=split < channels, BIAS=bias is not None, PRECISION=_precision(), WIDE=_wide(x), BP=POSITIONS, BO=block,
        BI=block, num_warps=_warps(block),
    )  # fmt: skip


def channel_mix(x: Tensor, x_b: Tensor | None, weight: Tensor, bias: Tensor | None, split: int) -> tuple[Tensor, Tensor]:
    """(y, y_b) of genfast::channel_mix."""
    y, y_b = output(x, split), output(x, weight.shape[0] - split)
    if x.numel():
        _launch_mix(x, x_b, weight, False, None if bias is None else bias.contiguous(), y, y_b, split)
    return y, y_b


def channel_mix_backward(
    grad_y: Tensor | None, grad_y_b: Tensor | None, x: Tensor, x_b: Tensor | None, weight: Tensor, split: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_b, dweight, dbias) of genfast::channel_mix_backward."""
    channels = weight.shape[0]
    dx, dx_b = output(x), output(x, channels - x.shape[1])
    if not x.numel():
        return dx, dx_b, torch.zeros_like(weight), weight.new_zeros(channels)
    d = output(x, split).zero_() if grad_y is None else grad_y
    d_b = None
    if split < channels:
        d_b = output(x, channels - split).zero_() if grad_y_b is None else grad_y_b
    _launch_mix(d, d_b, weight, True, None, dx, dx_b, x.shape[1])
    a, g = view(x), view(d)
    b, h = a if x_b is None else view(x_b), g if d_b is None else view(d_b)
    count, block = a.n * a.s, _block(channels)
    chunk = max(GRAD_POSITIONS, next_power_of_2(cdiv(count, 256)))  # about 256 chunks, so that every SM has work
    chunks = cdiv(count, chunk)
    partial = torch.empty((chunks, channels, channels + 1), device=x.device)
    blocks = cdiv(channels, block)
    _weight_grad[(blocks, blocks, chunks)](
        g.data, h.data, a.data, b.data, partial, *g.strides, *h.strides, *a.strides, *b.strides, channels, a.s, count, split,
        a.c, chunk,
        PAIR_D=d_b is not None, PAIR_X=x_b is not None, PRECISION=_precision(), WIDE=_wide(x), BP=GRAD_POSITIONS,
        BO=block, BI=block, num_warps=_warps(block),
    )  # fmt: skip
    sums = partial.sum(0)
    return dx, dx_b, sums[:, :channels].to(weight.dtype).contiguous(), sums[:, channels].to(weight.dtype).contiguous()


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = {k: f"*{kind}" for k in ("x", "x_b", "y", "y_b", "d", "d_b")}
        pointers |= {"weight": "*fp32", "bias": "*fp32", "partial": "*fp32"}
        for block in (16, 32):
            for precision in ("ieee", "tf32") if kind == "fp32" else ("ieee",):
                label = f"{kind} {precision} block {block}"
                flags = dict(PRECISION=precision, WIDE=False)
                base = dict(PAIR=True, SPLIT=True, BIAS=True, BP=POSITIONS, BO=block, BI=block, **flags)
                found.append(Aot(label, _mix, signature(_mix, base, pointers), base, _warps(block)))
                base = dict(PAIR_D=True, PAIR_X=True, BP=GRAD_POSITIONS, BO=block, BI=block, **flags)
                found.append(Aot(label, _weight_grad, signature(_weight_grad, base, pointers), base, _warps(block)))
    return found


AOT = _variants()
