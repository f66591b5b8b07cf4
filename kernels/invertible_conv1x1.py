"""Invertible 1x1 convolution (Glow 1807.03039 sec. 3.2) as a product over channels: y = W x + b at every position.

    backward  dx = W^T d, dW = sum d x^T, db = sum d over batch and positions

x (N, C, S) may come, and y may go, as two tensors that hold the channels before and from a split; W (C, C), b (C,).
Fused: concatenation, product, bias and split (and, through W and b, the activation norm before the convolution). The
    forward reads
x once and writes y once: 8 bytes and 2 C FLOPs an element in float32. On tensor cores (half types, TF32) that is bound
    by
memory bandwidth for all C here; in exact float32 it is bound by memory up to C of about 50 and by the FMA units beyond.
A program takes all output channels (up to 128) of a tile of positions of any samples, so x is not read again.

The backward is two passes over d: dx by the same kernel with W transposed, and dW with db, which reads x as well.
    Programs
of the second take every so many tiles of positions; their partial sums are added in an order that depends on the shape
alone.

Products of half types add in float32, and a float32 W meets them as the sum of two halves, so that it is not rounded.
float32 follows torch.backends.cuda.matmul.allow_tf32. Above LIBRARY_ABOVE channels the product is a matrix product
proper, whose time is its FLOPs (32 FLOPs a byte in float32 at 128 channels, where an H200's FMA units balance at 14),
so cuBLAS does it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, Choice, View, cdiv, output, precision, variant, view, wide

LIBRARY_ABOVE = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
_DEPTH = 16  # channels a step of the product: the least that every Triton release takes
# Of the product's tile: positions, warps and registers of its rule where 0.
TUNABLE = {
    "product": Choice(
        {"positions": 0, "depth": _DEPTH, "warps": 0, "stages": 2, "registers": 0},
        [
            dict(positions=p, depth=d, warps=w, stages=s, registers=r)
            for p, d, w, s, r in (
                (0, 16, 4, 2, 0),
                (0, 16, 4, 3, 255),
                (0, 32, 0, 2, 0),
                (0, 32, 4, 2, 255),
                (32, 16, 4, 2, 255),
                (64, 16, 4, 2, 255),
                (128, 16, 8, 2, 255),
                (128, 32, 8, 3, 255),
                (256, 16, 8, 2, 255),
            )
        ],
    )
}


@triton.jit
def _channels(a, b, an, ac, as_, bn, bc, bs, k, n, s, inside, first, C, HAS_A: tl.constexpr, HAS_B: tl.constexpr):
    """Channels k of two tensors, one behind the other, at positions (n, s); an absent one is zero."""
    value = tl.zeros(inside.shape, dtype=a.dtype.element_ty)
    if HAS_A:
        value = tl.load(a + (k * ac + (n * an + s * as_)), mask=inside & (k < first), other=0)
    if HAS_B:
        behind = inside & (k >= first) & (k < C)
        other = tl.load(b + ((k - first) * bc + (n * bn + s * bs)), mask=behind, other=0)
        value = tl.where(behind, other, value)
    return value


@triton.jit
def _mix(
    x,
    x_b,
    weight,
    bias,
    y,
    y_b,
    xn,
    xc,
    xs,
    bn,
    bc,
    bs,
    yn,
    yc,
    ys,
    zn,
    zc,
    zs,
    wo,
    wi,
    C,
    S,
    P,
    first,
    split,
    o_tiles,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``EXACT`` keeps the bits of W that x's type drops; ``WIDE`` multiplies in float32 (the interpreter's
    bfloat16)."""
    o = ((tl.program_id(0) % o_tiles) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    p_tile = tl.program_id(0) // o_tiles
    if FAR:
        p_tile = p_tile.to(tl.int64)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (p // S)[None, :]
    s = (p % S)[None, :]
    there = (p < P)[None, :]
    total = tl.zeros((BLOCK_O, BLOCK_P), dtype=tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = k[:, None]
        value = _channels(x, x_b, xn, xc, xs, bn, bc, bs, row, n, s, there & (row < C), first, C, HAS_A, HAS_B)
        w = tl.load(weight + (o * wo + k[None, :] * wi), mask=(o < C) & (k < C)[None, :], other=0)
        if WIDE:
            value = value.to(tl.float32)
        high = w.to(value.dtype)
        total = tl.dot(high, value, total, input_precision=PRECISION)
        if EXACT:
            low = (w.to(tl.float32) - high.to(tl.float32)).to(value.dtype)
            total = tl.dot(low, value, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + o, mask=o < C, other=0).to(tl.float32)
    out = total.to(y.dtype.element_ty)
    tl.store(y + (o * yc + (n * yn + s * ys)), out, mask=there & (o < split))
    if SPLIT:
        tl.store(y_b + ((o - split) * zc + (n * zn + s * zs)), out, mask=there & (o >= split) & (o < C))


@triton.jit
def _weight_grad(
    d,
    d_b,
    x,
    x_b,
    partial,
    dn,
    dc,
    ds,
    en,
    ec,
    es,
    xn,
    xc,
    xs,
    bn,
    bc,
    bs,
    C,
    S,
    P,
    split,
    first,
    tiles,
    p_tiles,
    chunks,
    HAS_D: tl.constexpr,
    HAS_D_B: tl.constexpr,
    HAS_B: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of dW, over the tiles of positions chunk, chunk + chunks, ...; those of the first column add db behind
    it."""
    pid = tl.program_id(0)
    column = (pid // tiles) % tiles
    chunk = pid // (tiles * tiles)
    o = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    i = column * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    plain = tl.zeros((BLOCK, BLOCK_P), dtype=tl.float32)
    for k in range(chunk, p_tiles, chunks):
        p = tl.full((1,), BLOCK_P, tl.int64 if FAR else tl.int32) * k + tl.arange(0, BLOCK_P)
        n = (p // S)[None, :]
        s = (p % S)[None, :]
        there = (p < P)[None, :]
        grad = _channels(
            d, d_b, dn, dc, ds, en, ec, es, o[:, None], n, s, there & (o < C)[:, None], split, C, HAS_D, HAS_D_B
        )
        value = _channels(
            x, x_b, xn, xc, xs, bn, bc, bs, i[:, None], n, s, there & (i < C)[:, None], first, C, True, HAS_B
        )
        plain += grad.to(tl.float32)
        if WIDE:
            value = value.to(tl.float32)
        total = tl.dot(grad.to(value.dtype), tl.trans(value), total, input_precision=PRECISION)
    at = partial + chunk.to(tl.int64) * C * (C + 1)
    tl.store(at + o[:, None] * (C + 1) + i[None, :], total, mask=(o < C)[:, None] & (i < C)[None, :])
    if column == 0:
        tl.store(at + o * (C + 1) + C, tl.sum(plain, axis=1), mask=o < C)


@triton.jit
def _finish(partial, dweight, dbias, wo, wi, C, chunks, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """Adds the partial sums of (dW, db) in order."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    size = C * (C + 1)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(0, chunks, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = (r < chunks)[:, None] & (e < size)[None, :]
        total += tl.sum(tl.load(partial + (r * size)[:, None] + e[None, :], mask=inside, other=0), axis=0)
    o = e // (C + 1)
    i = e % (C + 1)
    tl.store(dweight + o * wo + i * wi, total.to(dweight.dtype.element_ty), mask=(e < size) & (i < C))
    tl.store(dbias + o, total.to(dbias.dtype.element_ty), mask=(e < size) & (i == C))


def _options(block: int, far: bool) -> dict[str, int]:
    """Launch options. With fewer registers or more stages in flight some variant spills on some architecture (see
    aot.py)."""
    small = block < 64
    return {"num_warps": 4 if small else 8, "num_stages": 2, "maxnreg": 255 if far else 168 if small else 128}


def _mix_tile(channels: int, dtype: torch.dtype, far: bool) -> tuple[int, int]:
    """Output channels and positions of a tile; offsets of 64 bits take registers that sums would have."""
    block = min(128, max(16, triton.next_power_of_2(channels)))
    if dtype is torch.float32 or far:
        return block, 32 if block == 128 else 64
    return block, 128 if block < 64 else 64


def _grad_tile(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Channels and positions of a tile of the weight gradient."""
    block = min(64, max(16, triton.next_power_of_2(channels)))
    return block, 16 if dtype is torch.float32 and block > 16 else 32


def _pair(a: Tensor | None, b: Tensor | None, absent: View) -> tuple[View, View, bool, bool]:
    """Both as views; one that is not there is never read, so any view stands in for it."""
    has_a, has_b = a is not None and a.shape[1] > 0, b is not None and b.shape[1] > 0
    return view(a) if a is not None and has_a else absent, view(b) if b is not None and has_b else absent, has_a, has_b


def _launch_mix(
    x: Tensor | None, x_b: Tensor | None, first: int, weight: Tensor, bias: Tensor | None, y: Tensor, y_b: Tensor
) -> None:
    channels, out = weight.shape[0], view(y)
    a, b, has_a, has_b = _pair(x, x_b, out)
    rest = view(y_b) if y_b.shape[1] else out
    choice = TUNABLE["product"]
    far = _far(a, b, out, rest)
    block_o, block_p = _mix_tile(channels, y.dtype, far)
    block_p = choice["positions"] or block_p
    o_tiles = cdiv(channels, block_o)
    launch = _options(block_o, far)
    launch = {
        "num_warps": choice["warps"] or launch["num_warps"],
        "num_stages": choice["stages"],
        "maxnreg": choice["registers"] or launch["maxnreg"],
    }
    exact = weight.dtype is not y.dtype and y.dtype is not torch.float32 and not wide(y)
    _mix[(cdiv(out.n * out.s, block_p) * o_tiles,)](
        a.data,
        b.data,
        weight,
        weight if bias is None else bias.contiguous(),
        y,
        y_b,
        *a.strides,
        *b.strides,
        *out.strides,
        *rest.strides,
        *weight.stride(),
        channels,
        out.s,
        out.n * out.s,
        first,
        out.c,
        o_tiles,
        HAS_A=has_a,
        HAS_B=has_b,
        SPLIT=out.c < channels,
        BIAS=bias is not None,
        PRECISION=precision(y),
        EXACT=exact,
        WIDE=wide(y),
        FAR=far,
        BLOCK_O=block_o,
        BLOCK_P=block_p,
        BLOCK_K=choice["depth"],
        **launch,
    )


def _far(*views: View) -> bool:
    """Whether an offset needs 64 bits."""
    return any(v.far or v.n * v.n_stride >= 2**31 or v.n * v.s >= 2**31 - 128 for v in views)


def channel_mix(
    x: Tensor, x_b: Tensor | None, weight: Tensor, bias: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    """(y, y_b) of genfast::channel_mix."""
    y, y_b = output(x, split), output(x, weight.shape[0] - split)
    if not y.numel():
        return y, y_b
    if weight.shape[0] > LIBRARY_ABOVE[x.dtype]:
        _library_mix(x if x_b is None else torch.cat((x, x_b), 1), weight, bias, y, y_b)
    else:
        _launch_mix(x, x_b, x.shape[1], weight, bias, y, y_b)
    return y, y_b


def channel_mix_backward(
    grad_y: Tensor | None, grad_y_b: Tensor | None, x: Tensor, x_b: Tensor | None, weight: Tensor, split: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dx_b, dweight, dbias) of genfast::channel_mix_backward."""
    channels = weight.shape[0]
    dx, dx_b = output(x), output(x, channels - x.shape[1])
    dweight, dbias = torch.empty_like(weight), weight.new_empty(channels)
    if not x.numel():
        return dx, dx_b, dweight.zero_(), dbias.zero_()
    if channels > LIBRARY_ABOVE[x.dtype]:
        given = ((grad_y, split), (grad_y_b, channels - split))
        d = torch.cat([output(x, width).zero_() if g is None else g for g, width in given], 1)
        _library_mix(d, weight.t(), None, dx, dx_b)
        wide_x = x if x_b is None else torch.cat((x, x_b), 1)
        dweight.copy_(_rows(d).t() @ _rows(wide_x))
        return dx, dx_b, dweight, dbias.copy_(_rows(d).sum(0, dtype=torch.float32))
    _launch_mix(grad_y, grad_y_b, split, weight.t(), None, dx, dx_b)
    a, b, _, has_b = _pair(x, x_b, view(x))
    g, h, has_d, has_d_b = _pair(grad_y, grad_y_b, a)
    block, block_p = _grad_tile(channels, x.dtype)
    far = _far(a, b, g, h)
    tiles, p_tiles, size = cdiv(channels, block), cdiv(a.n * a.s, block_p), channels * (channels + 1)
    chunks = min(p_tiles, max(32, min(512, 2**20 // size)))  # enough for every multiprocessor, few enough to add up
    partial = torch.empty((chunks, size), dtype=torch.float32, device=x.device)
    _weight_grad[(tiles * tiles * chunks,)](
        g.data,
        h.data,
        a.data,
        b.data,
        partial,
        *g.strides,
        *h.strides,
        *a.strides,
        *b.strides,
        channels,
        a.s,
        a.n * a.s,
        split,
        a.c,
        tiles,
        p_tiles,
        chunks,
        HAS_D=has_d,
        HAS_D_B=has_d_b,
        HAS_B=has_b,
        PRECISION=precision(x),
        WIDE=wide(x),
        FAR=far,
        BLOCK=block,
        BLOCK_P=block_p,
        **_options(block, far),
    )
    _finish[(cdiv(size, 64),)](partial, dweight, dbias, *dweight.stride(), channels, chunks, BLOCK_E=64, BLOCK_R=32)
    return dx, dx_b, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    """(N, C, ...) as positions x channels; a view where channels lie together."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _library_mix(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, y_b: Tensor) -> None:
    """The product by the library, one a half, straight into the halves."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    split = y.shape[1]
    last = view(y).walks_channels
    for half, start in ((y, 0), (y_b, split)):
        if not half.shape[1]:
            continue
        w = weight[start : start + half.shape[1]]
        b = None if bias is None else bias[start : start + half.shape[1]]
        if last:
            product = _rows(x) @ w.t() if b is None else torch.addmm(b, _rows(x), w.t())
            half.copy_(product.reshape(x.shape[0], *x.shape[2:], -1).movedim(-1, 1))
        else:
            target, flat = half.view(*half.shape[:2], -1), x.flatten(2)
            wide = w.expand(x.shape[0], *w.shape)
            if b is None:
                torch.bmm(wide, flat, out=target)
            else:
                torch.baddbmm(b[:, None], wide, flat, out=target)


def _variants() -> list[Aot]:
    found = []
    absent = dict(WIDE=False, FAR=False)
    rows, last = ("xs", "bs", "ys", "zs", "ds", "es", "wi"), ("xc", "bc", "yc", "zc", "dc", "ec", "wi")

    def add(
        label: str, kernel: Any, kind: str, weight: str, ones: tuple[str, ...] | None, block: int, **base: Any
    ) -> None:
        pointers = dict.fromkeys(("x", "x_b", "y", "y_b", "d", "d_b"), f"*{kind}") | {"partial": "*fp32"}
        pointers |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), f"*{weight}")
        types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
        found.append(variant(label, kernel, types, base, ones, **_options(block, ones is None)))

    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for channels in (12, 24, 48, 96):
            for how in ("ieee", "tf32") if kind == "fp32" else ("ieee",):
                for form, ones in (("", rows), (" channels_last", last), (" any strides", None)):
                    if kind == "fp16" and form or form and channels in (24, 48) or how == "tf32" and channels == 24:
                        continue
                    base = absent | dict(PRECISION=how, FAR=ones is None)
                    label = f"{channels} channels {kind} {how}{form}"
                    o, p = _mix_tile(channels, dtype, ones is None)
                    mix = dict(HAS_A=True, HAS_B=True, SPLIT=True, BIAS=True, BLOCK_O=o, BLOCK_P=p, BLOCK_K=_DEPTH)
                    add(label, _mix, kind, "fp32", ones, o, EXACT=kind != "fp32", **mix, **base)
                    o, p = _grad_tile(channels, dtype)
                    grad = dict(HAS_D=True, HAS_D_B=True, HAS_B=True, BLOCK=o, BLOCK_P=p)
                    add(label, _weight_grad, kind, "fp32", ones, o, **grad, **base)
        o, p = _mix_tile(48, dtype, False)
        mix = dict(HAS_A=True, HAS_B=False, SPLIT=False, BIAS=False, BLOCK_O=o, BLOCK_P=p, BLOCK_K=_DEPTH)
        add(f"48 channels {kind} whole", _mix, kind, kind, rows, o, EXACT=False, PRECISION="ieee", **mix, **absent)
        add(f"sums to {kind}", _finish, kind, kind, ("wi",), 16, BLOCK_E=64, BLOCK_R=32)
    return found


AOT = _variants()
