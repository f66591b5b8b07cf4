"""How the C++ kernels see a tensor: (N, C, S) with strides, S the product of the spatial axes.

A kernel walks along S (``last=False``: NCHW) or along C (``last=True``: channels_last, and plain
vectors (N, C)), whichever is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where ``x`` is laid out so and not NCHW as well, else contiguous."""
    if x.is_contiguous():
        return torch.contiguous_format
    form = _CHANNELS_LAST.get(x.dim())
    if form is not None and x.is_contiguous(memory_format=form):
        return form
    if form is not None and x.dim() and x.stride(1) == 1 and x.shape[1] > 1:
        return form  # a slice of the channels of a channels_last tensor
    return torch.contiguous_format


def strides(x: Tensor, form: torch.memory_format) -> tuple[Tensor, int, int, int]:
    """``x`` and its (batch, channel, position) strides in elements; copies only where it must."""
    channels = x.shape[1]
    if form is torch.contiguous_format:
        if x.is_contiguous():
            step = x.numel() // (x.shape[0] * channels) if x.numel() else 0
            return x, channels * step, step, 1
        if x.dim() == 2:
            if x.stride(1) == 1 or channels == 1:
                return x, x.stride(0), 1, 1
        else:
            step = 1
            for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
                if size != 1 and stride != step:
                    break
                step *= size
            else:
                return x, x.stride(0), x.stride(1), 1
        return strides(x.contiguous(), form)
    if x.is_contiguous(memory_format=form):
        step = x.numel() // x.shape[0] if x.numel() else 0
        return x, step, 1, channels
    if x.stride(1) == 1 and x.shape[0]:
        step = x.stride(-1)
        expected = step
        for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
            if stride != expected:
                break
            expected *= size
        else:
            return x, x.stride(0), 1, step
    return strides(x.contiguous(memory_format=form), form)
