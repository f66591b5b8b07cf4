"""Affine coupling with log-determinant (NICE 1410.8516 sec. 3.2, RealNVP 1605.08803 eq. 6-9, Glow 1807.03039 table 1).

    forward   y_a = s(r) x_a + t, y_b = x_b, logdet[n] = sum log s;    inverse  x_a = (y_a - t) / s
    backward  with l = log s, d = grad_y, g = grad_logdet: dx = s d, dt = d, dr = l'(r) (s x d + g), s x = y - t

x (N, C, S), params (N, 2C', S), logdet (N,). Split, scale map, product, shift, concatenation and the sum over a sample are
one pass: per transformed element the forward reads x, r, t and writes y (16 bytes in float32), the backward reads d, x, r
and writes dx, dr, dt (24; 28 from the output); a passed element costs 8 each way. About 20 FLOPs: bound by memory bandwidth.

A program takes BLOCK elements of one sample in the order they lie in memory (NCHW or channels_last) and writes one partial
sum of the log-determinant; the partial sums are added in a fixed order by a second, tiny reduction. grad alpha is a second
pass over d, x and r, only where alpha is learned.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, cdiv, output, signature, view, wide

SCALES = ("exp", "sigmoid", "tanh", "softclamp", "additive")
BLOCK = 1024


@triton.jit
def _scale_map(r, alpha, SCALE: tl.constexpr):
    """log s, d log s / dr and tanh r, in float32."""
    slope = r * 0 + 1.0
    th = slope
    log_s = r
    if SCALE == 1:
        z = r + 2.0
        e = tl.exp(-tl.abs(z))
        log_s = tl.minimum(z, 0.0) - tl.log(1.0 + e)
        slope = tl.where(z < 0, 1.0 / (1.0 + e), e / (1.0 + e))
    if SCALE == 2 or SCALE == 5:
        e = tl.exp(-2.0 * tl.abs(r))
        th = (1.0 - e) / (1.0 + e)
        th = tl.where(r < 0, -th, th)
        log_s = alpha * th
        slope = alpha * (1.0 - th * th)
    if SCALE == 3:
        q = 1.0 / (1.0 + tl.abs(r) * 0.14476482730108395)  # 1 / log 1000
        log_s = r * q
        slope = q * q
    if SCALE == 4:
        log_s = r * 0
    return log_s, slope, th


@triton.jit
def _locate(i, C, S, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return i % C, i // C
    else:
        return i // S, i % S


@triton.jit
def _forward(
    x, params, alpha, mask, y, partial,
    xn, xc, xs, pn, pc, ps, yn, yc, ys, mc, ms, C, S, width, first, r_offset, t_offset, step, alpha_step,
    SCALE: tl.constexpr, INVERSE: tl.constexpr, MASKED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < C * S
    c, s = _locate(i, C, S, CHANNELS_LAST)
    j = c - first
    live = inside & (j >= 0) & (j < width)
    if MASKED:
        live = live & (tl.load(mask + c * mc + s * ms, mask=inside, other=1) == 0)
    value = tl.load(x + n * xn + c * xc + s * xs, mask=inside, other=0)
    at = params + n * pn + s * ps
    t = tl.load(at + (t_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
    r = t * 0
    if SCALE != 4:
        r = tl.load(at + (r_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
    a = r * 0 + 1.0
    if SCALE == 2:
        a = tl.load(alpha + j * alpha_step, mask=live, other=0).to(tl.float32)
    log_s, slope, th = _scale_map(r, a, SCALE)
    wide_value = value.to(tl.float32)
    if INVERSE:
        log_s = -log_s
        moved = (wide_value - t) * tl.exp(log_s)
    else:
        moved = wide_value * tl.exp(log_s) + t
    out = tl.where(live, moved, wide_value)
    tl.store(y + n * yn + c * yc + s * ys, out.to(y.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(live, log_s, 0.0), axis=0)
    tl.store(partial + n * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def _derivatives(d, kept, r, t, a, g, SCALE: tl.constexpr, INVERSE: tl.constexpr, KEEP_OUTPUT: tl.constexpr):
    """dx, dt, dL/d(log s), d log s / dr and tanh r."""
    log_s, slope, th = _scale_map(r, a, SCALE)
    if INVERSE:
        scale = tl.exp(-log_s)
        out = kept if KEEP_OUTPUT else (kept - t) * scale
        dx = d * scale
        return dx, -dx, -(out * d + g), slope, th
    else:
        scale = tl.exp(log_s)
        moved = kept - t if KEEP_OUTPUT else kept * scale
        return d * scale, d, moved * d + g, slope, th


@triton.jit
def _backward(
    grad_y, grad_logdet, kept, params, alpha, mask, dx, dparams,
    gn, gc, gs, kn, kc, ks, pn, pc, ps, xn, xc, xs, qn, qc, qs, mc, ms, C, S, width, first, r_offset, t_offset, step,
    alpha_step,
    HAS_Y: tl.constexpr, HAS_LOGDET: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr, KEEP_OUTPUT: tl.constexpr,
    MASKED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < C * S
    c, s = _locate(i, C, S, CHANNELS_LAST)
    j = c - first
    moved = inside & (j >= 0) & (j < width)
    live = moved
    if MASKED:
        live = live & (tl.load(mask + c * mc + s * ms, mask=inside, other=1) == 0)
    value = tl.load(kept + n * kn + c * kc + s * ks, mask=live, other=0).to(tl.float32)
    d = value * 0
    if HAS_Y:
        d = tl.load(grad_y + n * gn + c * gc + s * gs, mask=inside, other=0).to(tl.float32)
    g = 0.0
    if HAS_LOGDET:
        g = tl.load(grad_logdet + n).to(tl.float32)
    at = params + n * pn + s * ps
    t = value * 0
    if INVERSE != KEEP_OUTPUT:
        t = tl.load(at + (t_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
    r = value * 0
    if SCALE != 4:
        r = tl.load(at + (r_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
    a = r * 0 + 1.0
    if SCALE == 2:
        a = tl.load(alpha + j * alpha_step, mask=live, other=0).to(tl.float32)
    gx, gt, gl, slope, th = _derivatives(d, value, r, t, a, g, SCALE, INVERSE, KEEP_OUTPUT)
    tl.store(dx + n * xn + c * xc + s * xs, tl.where(live, gx, d).to(dx.dtype.element_ty), mask=inside)
    to = dparams + n * qn + s * qs
    tl.store(to + (t_offset + j * step) * qc, tl.where(live, gt, 0.0).to(dparams.dtype.element_ty), mask=moved)
    if SCALE != 4:
        gr = tl.where(live, gl * slope, 0.0)
        tl.store(to + (r_offset + j * step) * qc, gr.to(dparams.dtype.element_ty), mask=moved)


@triton.jit
def _alpha_grad(
    grad_y, grad_logdet, kept, params, alpha, mask, partial,
    gn, gc, gs, kn, kc, ks, pn, pc, ps, mc, ms, S, width, first, r_offset, t_offset, step, alpha_step,
    HAS_Y: tl.constexpr, HAS_LOGDET: tl.constexpr, INVERSE: tl.constexpr, KEEP_OUTPUT: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over the positions of one transformed channel of one sample."""
    j = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    c = first + j
    g = 0.0
    if HAS_LOGDET:
        g = tl.load(grad_logdet + n).to(tl.float32)
    a = tl.load(alpha + j * alpha_step).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK).to(tl.int64)
        live = s < S
        if MASKED:
            live = live & (tl.load(mask + c * mc + s * ms, mask=live, other=1) == 0)
        value = tl.load(kept + n * kn + c * kc + s * ks, mask=live, other=0).to(tl.float32)
        d = value * 0
        if HAS_Y:
            d = tl.load(grad_y + n * gn + c * gc + s * gs, mask=live, other=0).to(tl.float32)
        at = params + n * pn + s * ps
        r = tl.load(at + (r_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
        t = tl.load(at + (t_offset + j * step) * pc, mask=live, other=0).to(tl.float32)
        gx, gt, gl, slope, th = _derivatives(d, value, r, t, a, g, 2, INVERSE, KEEP_OUTPUT)
        total += tl.where(live, gl * th, 0.0)
    tl.store(partial + n * width + j, tl.sum(total, axis=0))


def _offsets(layout: str, width: int, scale: str) -> tuple[int, int, int]:
    """Channel of r_0, channel of t_0, and the step between channels, in params."""
    if scale == "additive":
        return 0, 0, 1
    step = 2 if layout.endswith("interleaved") else 1
    second = 1 if step == 2 else width
    return (0, second, step) if layout.startswith("scale") else (second, 0, step)


def _mask_bytes(mask: Tensor | None, x: Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """The mask as bytes with its strides over (C, S); broadcast axes are copied out, they are small."""
    if mask is None:
        return like, 0, 0
    full = mask.expand(x.shape[1:]).contiguous().view(torch.uint8)
    size = full[0].numel() if full.dim() > 1 else 1
    return full, size, 1


def affine_coupling(
    x: Tensor, params: Tensor, alpha: Tensor | None, mask: Tensor | None, scale: str, layout: str, last: bool, inverse: bool,
    keep_output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, logdet) of genfast::affine_coupling."""
    y, a, p = output(x), view(x), view(params)
    if not x.numel():
        return y, torch.zeros(a.n, dtype=wide(x.dtype), device=x.device)
    out, width = view(y), p.c if scale == "additive" else p.c // 2
    blocks = cdiv(a.c * a.s, BLOCK)
    partial = torch.empty((a.n, blocks), dtype=torch.float32, device=x.device)
    bytes_, mc, ms = _mask_bytes(mask, x, x)
    _forward[(blocks, a.n)](
        a.data, p.data, x if alpha is None else alpha.contiguous(), bytes_, y, partial, *a.strides, *p.strides, *out.strides,
        mc, ms, a.c, a.s, width, a.c - width if last else 0, *_offsets(layout, width, scale),
        int(alpha is not None and alpha.shape[0] > 1),
        SCALE=_code(scale, alpha), INVERSE=inverse, MASKED=mask is not None, CHANNELS_LAST=a.channels_last, BLOCK=BLOCK,
    )  # fmt: skip
    return y, partial.sum(1)


def _code(scale: str, alpha: Tensor | None) -> int:
    return 5 if scale == "tanh" and alpha is None else SCALES.index(scale)


def affine_coupling_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, kept: Tensor, params: Tensor, alpha: Tensor | None,
    mask: Tensor | None, scale: str, layout: str, last: bool, inverse: bool, keep_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dparams, dalpha) of genfast::affine_coupling_backward."""
    dx, dparams = output(kept), output(params)
    none = torch.zeros(0 if alpha is None else alpha.shape[0], dtype=kept.dtype, device=kept.device)
    if not kept.numel():
        return dx, dparams, none
    a, p, q = view(kept), view(params), view(dparams)
    g = a if grad_y is None else view(grad_y)
    width = p.c if scale == "additive" else p.c // 2
    bytes_, mc, ms = _mask_bytes(mask, kept, kept)
    logdet = kept if grad_logdet is None else grad_logdet.contiguous()
    flags: dict[str, Any] = dict(
        HAS_Y=grad_y is not None, HAS_LOGDET=grad_logdet is not None, INVERSE=inverse, KEEP_OUTPUT=keep_output,
        MASKED=mask is not None,
    )  # fmt: skip
    first, offsets = a.c - width if last else 0, _offsets(layout, width, scale)
    factor = kept if alpha is None else alpha.contiguous()
    alpha_step = int(alpha is not None and alpha.shape[0] > 1)
    _backward[(cdiv(a.c * a.s, BLOCK), a.n)](
        g.data, logdet, a.data, p.data, factor, bytes_, dx, dparams, *g.strides, *a.strides, *p.strides, *view(dx).strides,
        *q.strides, mc, ms, a.c, a.s, width, first, *offsets, alpha_step,
        SCALE=_code(scale, alpha), CHANNELS_LAST=a.channels_last, BLOCK=BLOCK, **flags,
    )  # fmt: skip
    if alpha is None:
        return dx, dparams, none
    partial = torch.empty((a.n, width), dtype=torch.float32, device=kept.device)
    _alpha_grad[(width, a.n)](
        g.data, logdet, a.data, p.data, factor, bytes_, partial, *g.strides, *a.strides, *p.strides, mc, ms, a.s, width, first,
        *offsets, alpha_step, BLOCK=256, **flags,
    )  # fmt: skip
    total = partial.sum(0)
    return dx, dparams, (total if alpha.shape[0] == width else total.sum().reshape(1)).to(alpha.dtype)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        pointers = {k: f"*{kind}" for k in ("x", "params", "alpha", "y", "grad_y", "kept", "dx", "dparams")}
        pointers |= {"mask": "*u8", "partial": "*fp32", "grad_logdet": "*fp32"}
        for code, scale in enumerate((*SCALES, "tanh without alpha")):
            for inverse in (False, True):
                for last in (False, True) if kind == "fp32" else (False,):
                    base = dict(SCALE=code, INVERSE=inverse, MASKED=code == 2, CHANNELS_LAST=last, BLOCK=BLOCK)
                    label = f"{scale}{' inverse' if inverse else ''}{' channels_last' if last else ''} {kind}"
                    found.append(Aot(label, _forward, signature(_forward, base, pointers), base))
                    base = base | dict(HAS_Y=True, HAS_LOGDET=True, KEEP_OUTPUT=inverse)
                    found.append(Aot(label, _backward, signature(_backward, base, pointers), base))
        base = dict(HAS_Y=True, HAS_LOGDET=True, INVERSE=False, KEEP_OUTPUT=True, MASKED=True, BLOCK=256)
        found.append(Aot(kind, _alpha_grad, signature(_alpha_grad, base, pointers), base))
    return found


AOT = _variants()
