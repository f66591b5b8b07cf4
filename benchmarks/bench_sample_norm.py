"""The norm of each sample's gradient, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor) -> Tensor:
    """What one writes."""
    return x.flatten(1).square().sum(1).sqrt()


def trick(x: Tensor) -> Tensor:
    """The library's own, whose gradient at zero is zero too."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _case(shape: tuple[int, ...], quick: bool) -> Case:
    def work(function: Callable[[Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        x = torch.randn(shape, device=_ceilings.DEVICE, requires_grad=True)
        weights = torch.randn(shape[0], device=_ceilings.DEVICE)
        return lambda: gradients((function(x),), (x,), (weights,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(genfast.ops.sample_norm),
    }
    # float32: the forward reads x, the backward reads it and writes its gradient.
    return Case(f"sample_norm {shape}", providers, bytes=12 * math.prod(shape), quick=quick)


CASES = [_case((64, 3, 64, 64), True), _case((64, 3, 256, 256), False), _case((256, 2), False)]
