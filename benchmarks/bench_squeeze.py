"""Squeezing, forward and backward, against the library's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor) -> Tensor:
    """View, permute, copy, as the flow libraries write it."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, h, w = shape

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        x = torch.randn(shape, device=_ceilings.DEVICE).contiguous(memory_format=form).requires_grad_()
        gy = torch.randn(n, 4 * c, h // 2, w // 2, device=_ceilings.DEVICE).contiguous(memory_format=form)
        return lambda: gradients((function(x),), (x,), (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(lambda x: F.pixel_unshuffle(x, 2)),
        "genfast": lambda: work(genfast.ops.squeeze),
    }
    name = f"squeeze {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 4 * n * c * h * w, quick=quick)


CASES = [_case((64, 12, 32, 32), False, True), _case((64, 12, 32, 32), True, False)]
