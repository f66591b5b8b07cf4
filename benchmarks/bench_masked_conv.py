"""Masked convolution, forward and backward, against the dense convolution of the masked weight and hand-made crops of
it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients

Function = Callable[[Tensor, Tensor], Tensor]


def _arrangements(k: int, mask: Tensor) -> dict[str, Function]:
    """Type B, odd k, same size: what people write, and the ways to leave dead taps out with library calls."""
    p = k // 2

    def dense(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w * mask, padding=p)

    def crop(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (p, p, p, 0)), w[:, :, : p + 1] * mask[: p + 1])

    def crop_sliced(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w[:, :, : p + 1] * mask[: p + 1], padding=p)[:, :, : x.shape[2]]

    def split(x: Tensor, w: Tensor) -> Tensor:
        above = F.conv2d(F.pad(x, (p, p, p, -1)), w[:, :, :p])
        return above + F.conv2d(F.pad(x, (p, 0, 0, 0)), w[:, :, p : p + 1, : p + 1])

    return {"reference": dense, "trick crop": crop, "trick crop, sliced": crop_sliced, "trick split rows": split}


def _case(
    k: int,
    shape: tuple[int, int, int, int],
    out: int,
    *,
    channels_last: bool,
    quick: bool,
    dtype: str = "float32",
    priority: int = 1,
) -> Case:
    n, channels, h, w = shape
    kind = _ceilings.DTYPES[dtype]
    form = torch.channels_last if channels_last else torch.contiguous_format

    def masked() -> dict[str, Function]:
        mask = torch.ones(k, k, device=_ceilings.DEVICE, dtype=kind)
        mask[k // 2, k // 2 + 1 :] = 0
        mask[k // 2 + 1 :] = 0
        return _arrangements(k, mask)

    def work(function: Function) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(shape, device=device).to(kind).contiguous(memory_format=form).requires_grad_()
        weight = (torch.randn(out, channels, k, k, device=device) / (channels * k * k) ** 0.5).to(kind).requires_grad_()
        gy = torch.randn(n, out, h, w, device=device).to(kind).contiguous(memory_format=form)

        def run() -> list[Tensor]:
            y, dx, dw = gradients((function(x, weight),), (x, weight), (gy,))
            return [y, dx, dw]

        return run

    providers: dict[str, Callable[[], Work]] = {
        "reference": lambda: work(masked()["reference"]),
        "compile": lambda: work(torch.compile(masked()["reference"], dynamic=False)),
    }
    for name in ("trick crop", "trick crop, sliced", "trick split rows"):
        providers[name] = lambda name=name: work(masked()[name])  # type: ignore[misc]
    providers["genfast"] = lambda: work(lambda x, w: genfast.ops.masked_conv2d(x, w, mask_type="B"))
    taps = (k * k + 1) // 2
    label = f"masked_conv2d {k}x{k} {channels} to {out}, {n}x{h}x{w}{' channels_last' if channels_last else ''}"
    label += "" if dtype == "float32" else f" {dtype}"
    flops = 3 * 2 * n * h * w * out * channels * taps
    return Case(label, providers, flops=flops, quick=quick, dtype=dtype, priority=priority)


def _wavenet(quick: bool, *, n: int = 1, dtype: str = "float32", priority: int = 1) -> Case:
    shape, out, dilation = (n, 64, 16000), 128, 64
    kind = _ceilings.DTYPES[dtype]

    def work(function: Function) -> Work:
        torch.manual_seed(0)
        x = torch.randn(shape, device=_ceilings.DEVICE).to(kind).requires_grad_()
        weight = (torch.randn(out, 64, 2, device=_ceilings.DEVICE) / 128**0.5).to(kind).requires_grad_()
        gy = torch.randn(n, out, shape[2], device=_ceilings.DEVICE).to(kind)
        return lambda: gradients((function(x, weight),), (x, weight), (gy,))

    def library(x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (dilation, 0)), w, dilation=dilation)

    providers = {
        "reference": lambda: work(library),
        "compile": lambda: work(torch.compile(library, dynamic=False)),
        "genfast": lambda: work(lambda x, w: genfast.ops.masked_conv1d(x, w, mask_type="B", dilation=dilation)),
    }
    name = f"masked_conv1d k=2 d=64, {n}x64x16000 to 128{'' if dtype == 'float32' else f' {dtype}'}"
    return Case(name, providers, flops=3 * 2 * n * 16000 * 128 * 128, quick=quick, dtype=dtype, priority=priority)


CASES = [
    _case(7, (16, 64, 28, 28), 64, channels_last=False, quick=True),
    _case(7, (16, 64, 28, 28), 64, channels_last=True, quick=False),
    _case(3, (16, 64, 28, 28), 64, channels_last=False, quick=True),
    _case(3, (16, 64, 28, 28), 64, channels_last=True, quick=False),
    _case(5, (16, 66, 32, 32), 132, channels_last=False, quick=False),
    _wavenet(False),
]

if _ceilings.DEVICE == "cuda":
    CASES += [
        _case(k, shape, out, channels_last=channels_last, quick=False, dtype=dtype, priority=0)
        for k, shape, out in ((7, (64, 64, 32, 32), 64), (3, (64, 128, 32, 32), 128))
        for dtype in ("bfloat16", "tf32")
        for channels_last in (False, True)
    ]
    CASES += [_wavenet(False, n=8, dtype=dtype, priority=0) for dtype in ("bfloat16", "tf32")]
