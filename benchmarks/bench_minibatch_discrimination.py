"""The pairwise part of minibatch discrimination: forward and backward, and the second backward that a penalty takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(m: Tensor) -> Tensor:
    """What one writes, and what makes N x N x B x C elements."""
    return (-(m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)).exp().sum(1)


def trick(m: Tensor) -> Tensor:
    """The library's distances, N x N x B elements; its backward has no derivative."""
    by_kernel = m.transpose(0, 1).contiguous()
    return (-torch.cdist(by_kernel, by_kernel, p=1)).exp().sum(2).mT


def _case(shape: tuple[int, int, int], second: bool, quick: bool) -> Case:
    def work(function: Callable[[Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        m = torch.randn(shape, device=_ceilings.DEVICE, requires_grad=True)
        weights = torch.rand(shape[:2], device=_ceilings.DEVICE)
        direction = torch.randn(shape, device=_ceilings.DEVICE)

        def penalty() -> list[Tensor]:
            (slope,) = torch.autograd.grad(function(m), m, weights, create_graph=True)
            return [slope, *torch.autograd.grad(slope, m, direction)]

        return penalty if second else lambda: gradients((function(m),), (m,), (weights,))

    providers = {"reference": lambda: work(eager), "genfast": lambda: work(genfast.ops.pairwise_l1_kernel_sum)}
    if not second:
        providers |= {"compile": lambda: work(torch.compile(eager, dynamic=False)), "trick": lambda: work(trick)}
        providers = {name: providers[name] for name in ("reference", "compile", "trick", "genfast")}
    n, b, c = shape
    # Of half the pairs: difference, magnitude and sum, then sign, product and two sums.
    flops = n * n * b * (3 * c + 20) // 2 * (3 if second else 2)
    name = f"minibatch_discrimination {shape}{' second backward' if second else ''}"
    return Case(name, providers, flops=flops, quick=quick)


CASES = [_case((64, 100, 5), False, True), _case((256, 50, 16), False, False), _case((64, 100, 5), True, True)]
