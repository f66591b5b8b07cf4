"""What the choices of the kernels bound by memory are tried on (see tune.py): images of 64 channels, 64 x 64.

A size is the bytes that a call moves, inputs and outputs; the batch follows from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.tune import TINY, Job, Sweep, Work
from genfast.kernels import actnorm

SIZES = {TINY: 0, "256 MB": 1 << 28, "1 GB": 1 << 30}


def images(moved: int, tensors: float, dtype: torch.dtype, device: str, channels: int = 64) -> Tensor:
    """Random images, so many that ``tensors`` of them are ``moved`` bytes; a few of odd shape where that is 0."""
    if not moved:
        return torch.randn(2, min(channels, 6), 17, 70, device=device).to(dtype)
    batch = max(1, round(moved / (tensors * channels * 4096 * dtype.itemsize)))
    return torch.randn(batch, channels, 64, 64, device=device, dtype=dtype)


def job(work: Work, x: Tensor, tensors: float) -> Job:
    return Job(work, round(tensors * x.numel() * x.element_size()))


# ---- actnorm ----


def _per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(0.1 * torch.randn(x.shape[1], device=x.device, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


def actnorm_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    scale, bias = _per_channel(x)
    return job(lambda: actnorm.actnorm(x, scale, bias, True, False), x, 2)


def actnorm_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x, d = (images(size, 3, dtype, device) for _ in range(2))
    scale, bias = _per_channel(x)
    g = torch.randn(x.shape[0], device=device)
    return job(lambda: actnorm.actnorm_backward(d, g, x, scale, bias, True, False), x, 3)


def _sweep(family: str, choice: str, make: Any, **more: Any) -> Sweep:
    return Sweep(family, choice, make, SIZES, **more)


SWEEPS = [
    _sweep("actnorm", "forward", actnorm_forward),
    _sweep("actnorm", "backward", actnorm_backward),
]
