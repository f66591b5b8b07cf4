"""Upsample, pad, filter, downsample (StyleGAN2 1912.04958; scipy.signal.upfirdn in two dimensions).

    y[oy, ox] = sum_ij g[i, j] z[oy dy - py + i, ox dx - px + j],  z[k u] = x[k], zero elsewhere;  g is the filter
    reversed

x (N, C, H, W), y (N, C, OH, OW). Only taps that meet an element of x are multiplied: ceil(fh / uy) ceil(fw / ux) an
output, the first found from the output's phase. Reads x, whose repeated reads the first cache serves, and writes y: 4
(1 / u^2 + 1) or 4 (d^2 + 1) bytes an output in float32, bound by memory bandwidth for the usual 4 x 4 taps. A program
takes a tile of outputs: rows of all channels along W in NCHW, positions along C in channels_last. A filter of one axis
    with more than SPLIT products an
output goes in two passes, along W and then along H, with a float32 image between them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, Choice, cdiv, every, options, variant

# Of a tile its elements, those of them along the contiguous axis, and those of a thread.
TUNABLE = {
    "filter": Choice(
        dict(tile=1024, inner=256, each=8), every(tile=(256, 512, 1024, 2048), inner=(64, 128, 256), each=(2, 4, 8))
    )
}
SPLIT = 16  # products an output from which two passes of a separable filter cost less than one


@triton.jit
def _first(o, DOWN: tl.constexpr, UP: tl.constexpr, shift, whole):
    """The first tap that meets an element for outputs o, and that element; ``shift`` = UP whole - padding is not
    negative."""
    t = o * DOWN + shift
    k = (UP - t % UP) % UP
    return k, (t + k) // UP - whole


@triton.jit
def _filter(
    x,
    f,
    y,
    xn,
    xc,
    xh,
    xw,
    yn,
    yc,
    yh,
    yw,
    C,
    H,
    W,
    OH,
    OW,
    shift_y,
    whole_y,
    shift_x,
    whole_x,
    gain,
    row_tiles,
    tiles,
    UX: tl.constexpr,
    UY: tl.constexpr,
    DX: tl.constexpr,
    DY: tl.constexpr,
    FH: tl.constexpr,
    FW: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles
    rows = ((k % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    inner = ((k // row_tiles) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    if FAR:
        rows = rows.to(tl.int64)
        inner = inner.to(tl.int64)
    if CHANNELS_LAST:
        c = inner
        oy = rows // OW
        ox = rows % OW
        inside = (oy < OH) & (c < C)
    else:
        c = rows // OH
        oy = rows % OH
        ox = inner
        inside = (c < C) & (ox < OW)
    ky, iy = _first(oy, DY, UY, shift_y, whole_y)
    kx, ix = _first(ox, DX, UX, shift_x, whole_x)
    source = x + n * xn + c * xc
    total = tl.zeros((BLOCK_R, BLOCK_I), dtype=tl.float32)
    for i in range(TAPS_Y):
        here_y = (ky + i * UY < FH) & (iy + i >= 0) & (iy + i < H)
        tap_y = ky + i * UY if FLIP else FH - 1 - ky - i * UY
        for j in tl.static_range(TAPS_X):
            here = inside & here_y & (kx + j * UX < FW) & (ix + j >= 0) & (ix + j < W)
            tap_x = kx + j * UX if FLIP else FW - 1 - kx - j * UX
            if SEPARABLE:
                weight = tl.load(f + tap_y + tap_x * 0, mask=here, other=0) * tl.load(
                    f + tap_x + tap_y * 0, mask=here, other=0
                )
            else:
                weight = tl.load(f + tap_y * FW + tap_x, mask=here, other=0)
            value = tl.load(source + ((iy + i) * xh + (ix + j) * xw), mask=here, other=0).to(tl.float32)
            total += tl.where(here, weight * value, 0.0)
    tl.store(y + n * yn + (c * yc + oy * yh + ox * yw), (total * gain).to(y.dtype.element_ty), mask=inside)


def _shift(padding: int, up: int) -> tuple[int, int]:
    whole = max(cdiv(padding, up), 0)
    return whole * up - padding, whole


def _options(elements: int, far: bool, taps: int) -> dict[str, int]:
    """Taps along W are unrolled, and many of them need all the registers that there are."""
    return options(elements, far, True, TUNABLE["filter"]["each"]) | ({"maxnreg": 255} if taps > 8 else {})


def _launch(
    x: Tensor,
    f: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    size: tuple[int, int],
    up: tuple[int, int],
    down: tuple[int, int],
    before: tuple[int, int],
    separable: bool,
    flip: bool,
    gain: float,
) -> Tensor:
    """One pass with a filter of ``size`` = (width, height)."""
    form = memory_format(x)
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=form)
    if not y.numel():
        return y
    n, c, oh, ow = shape
    last = form is not torch.contiguous_format
    rows, inner = (oh * ow, c) if last else (c * oh, ow)
    choice = TUNABLE["filter"].of(x.element_size())
    block_i = min(triton.next_power_of_2(inner), choice["inner"])
    block_r = min(triton.next_power_of_2(rows), choice["tile"] // block_i)
    row_tiles = cdiv(rows, block_r)
    tiles = row_tiles * cdiv(inner, block_i)
    far = any(sum(s * t for s, t in zip(t.shape[1:], t.stride()[1:])) >= 2**31 for t in (x, y))
    (shift_x, whole_x), (shift_y, whole_y) = _shift(before[0], up[0]), _shift(before[1], up[1])
    _filter[(n * tiles,)](
        x,
        f,
        y,
        *x.stride(),
        *y.stride(),
        c,
        x.shape[2],
        x.shape[3],
        oh,
        ow,
        shift_y,
        whole_y,
        shift_x,
        whole_x,
        gain,
        row_tiles,
        tiles,
        UX=up[0],
        UY=up[1],
        DX=down[0],
        DY=down[1],
        FH=size[1],
        FW=size[0],
        TAPS_Y=cdiv(size[1], up[1]),
        TAPS_X=cdiv(size[0], up[0]),
        SEPARABLE=separable,
        FLIP=flip,
        CHANNELS_LAST=last,
        FAR=far,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        **_options(block_r * block_i, far, size[0]),
    )
    return y


def upfirdn2d(x: Tensor, filter: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float) -> Tensor:
    """y of genfast::upfirdn2d."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = up, down, padding
    f = filter.to(torch.float32).contiguous()
    fw, fh = f.shape[-1], f.shape[0]
    n, c, h, w = x.shape
    oh, ow = (h * uy + y0 + y1 - fh) // dy + 1, (w * ux + x0 + x1 - fw) // dx + 1
    separable = f.dim() == 1
    if separable and cdiv(fh, uy) * cdiv(fw, ux) > SPLIT:
        z = _launch(x, f, (n, c, h, ow), torch.float32, (fw, 1), (ux, 1), (dx, 1), (x0, 0), False, flip_filter, 1.0)
        return _launch(z, f, (n, c, oh, ow), x.dtype, (1, fh), (1, uy), (1, dy), (0, y0), False, flip_filter, gain)
    return _launch(x, f, (n, c, oh, ow), x.dtype, (fw, fh), (ux, uy), (dx, dy), (x0, y0), separable, flip_filter, gain)


def _variants() -> list[Aot]:
    found = []
    elements = TUNABLE["filter"]["tile"]
    base = dict(UX=1, UY=1, DX=1, DY=1, SEPARABLE=False, FLIP=False, CHANNELS_LAST=False, FAR=False)
    base |= dict(BLOCK_R=elements // 64, BLOCK_I=64)

    def add(label: str, kind: str, ones: tuple[str, ...] | None, size: tuple[int, int], **changed: Any) -> None:
        constants = base | changed
        constants |= dict(
            FW=size[0], FH=size[1], TAPS_X=cdiv(size[0], constants["UX"]), TAPS_Y=cdiv(size[1], constants["UY"])
        )
        types = dict(x=f"*{kind}", y=f"*{kind}", f="*fp32", gain="fp32")
        found.append(variant(label, _filter, types, constants, ones, **_options(elements, constants["FAR"], size[0])))

    for kind in ("fp32", "bf16", "fp16"):
        for name, factors in (("up", dict(UX=2, UY=2)), ("down", dict(DX=2, DY=2, FLIP=True)), ("filter", {})):
            add(f"{name} 4x4 {kind}", kind, ("xw", "yw"), (4, 4), **factors)
            add(f"{name} 4x4 channels_last {kind}", kind, ("xc", "yc"), (4, 4), CHANNELS_LAST=True, **factors)
    add("separable up by 4 12 taps fp32", "fp32", ("xw", "yw"), (12, 12), SEPARABLE=True, UX=4, UY=4)
    add("along W 12 taps fp32", "fp32", ("xw", "yw"), (12, 1), DX=2)
    add("along H 12 taps fp32", "fp32", ("xw", "yw"), (1, 12), DY=2)
    add("any strides fp32", "fp32", None, (4, 4), UX=2, UY=2, FAR=True)
    return found


AOT = _variants()
