"""Points between real and generated samples, without a gradient as WGAN-GP takes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work


def _column(epsilon: Tensor, like: Tensor) -> Tensor:
    return epsilon.reshape(-1, *(1,) * (like.dim() - 1))


def eager(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """What one writes."""
    e = _column(epsilon, real)
    return e * real + (1 - e) * fake


def trick(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    return torch.lerp(fake, real, _column(epsilon, real))


def _case(shape: tuple[int, ...], quick: bool) -> Case:
    def work(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        real, fake = (torch.randn(shape, device=_ceilings.DEVICE) for _ in range(2))
        epsilon = torch.rand(shape[0], device=_ceilings.DEVICE)
        return lambda: function(real, fake, epsilon)

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(lambda real, fake, e: genfast.ops.interpolate(real, fake, epsilon=e)),
    }
    return Case(f"interpolate {shape}", providers, bytes=12 * math.prod(shape), quick=quick)


CASES = [_case((64, 3, 64, 64), True), _case((64, 3, 256, 256), False), _case((256, 2), False)]
