"""Pixel norm, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor) -> Tensor:
    """What one writes."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def trick(x: Tensor) -> Tensor:
    """The norm of the library, which is one reduction: sqrt(C) x / |x|; rms_norm where the features are last."""
    if x.dim() == 2:
        return F.rms_norm(x, x.shape[1:], eps=1e-8)
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-8).permute(0, 3, 1, 2)
    return F.normalize(x, dim=1, eps=1e-8).mul_(x.shape[1] ** 0.5)


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    elements = 1
    for size in shape:
        elements *= size

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        x, gy = (torch.randn(shape, device=_ceilings.DEVICE).contiguous(memory_format=form) for _ in range(2))
        inputs = (x.requires_grad_(),)
        return lambda: gradients((function(*inputs),), inputs, (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(genfast.ops.pixel_norm),
    }
    # float32: the forward reads x and writes y, the backward reads grad y and x and writes dx.
    name = f"pixel_norm {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 5 * elements, quick=quick)


CASES = [
    _case((16, 256, 32, 32), False, True),
    _case((16, 256, 32, 32), True, False),
    _case((8, 512, 64, 64), False, False),
    _case((4096, 512), False, False),
]
