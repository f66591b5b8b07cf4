"""Squeezing (RealNVP 1605.08803 sec. 3.6): f x f blocks of positions to channels and back, in both channel orders.

(N, C, H, W) <-> (N, f^2 C, H/f, W/f). A pure move: each element is read once and written once (8 bytes in float32), bound
by memory bandwidth. A program writes BLOCK elements in the order they lie in the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, cdiv, signature

BLOCK = 1024


@triton.jit
def _move(
    x, y, xn, xc, xh, xw, yn, yc, yh, yw, C, H, W, total, f,
    INVERSE: tl.constexpr, DEPTH_FIRST: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """C, H, W are the output's; x's strides are the input's."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < total
    if CHANNELS_LAST:
        c = k % C
        w = (k // C) % W
        h = (k // (C * W)) % H
    else:
        w = k % W
        h = (k // W) % H
        c = (k // (W * H)) % C
    n = k // (C * H * W)
    if INVERSE:  # the output is wide: which channel of the input holds it
        i, j = h % f, w % f
        from_c = (i * f + j) * C + c if DEPTH_FIRST else (c * f + i) * f + j
        from_h, from_w = h // f, w // f
    else:
        wide = C // (f * f)
        offset = c // wide if DEPTH_FIRST else c % (f * f)
        from_c = c % wide if DEPTH_FIRST else c // (f * f)
        from_h, from_w = h * f + offset // f, w * f + offset % f
    value = tl.load(x + n * xn + from_c * xc + from_h * xh + from_w * xw, mask=inside)
    tl.store(y + n * yn + c * yc + h * yh + w * yw, value, mask=inside)


def squeeze(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    """y of genfast::squeeze."""
    f, (n, c, h, w) = factor, x.shape
    shape = (n, c // (f * f), h * f, w * f) if inverse else (n, c * f * f, h // f, w // f)
    last = not x.is_contiguous() and x.stride(1) == 1 and c > 1
    form = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)
    if y.numel():
        _move[(cdiv(y.numel(), BLOCK),)](
            x, y, *x.stride(), *y.stride(), *shape[1:], y.numel(), f,
            INVERSE=inverse, DEPTH_FIRST=order == "space_to_depth", CHANNELS_LAST=last, BLOCK=BLOCK,
        )  # fmt: skip
    return y


def _variants() -> list[Aot]:
    found = []
    for inverse in (False, True):
        for depth in (False, True):
            for last in (False, True):
                base = dict(INVERSE=inverse, DEPTH_FIRST=depth, CHANNELS_LAST=last, BLOCK=BLOCK)
                label = f"{'unsqueeze' if inverse else 'squeeze'}{' space_to_depth' if depth else ''}{' channels_last' if last else ''}"
                found.append(Aot(label, _move, signature(_move, base, {"x": "*fp32", "y": "*fp32"}), base))
    return found


AOT = _variants()
