"""The standard deviation over groups of the batch as one more channel, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor) -> Tensor:
    """The layer as StyleGAN2 has it, for groups of four and one feature."""
    tail = x.shape[2:]
    y = x.reshape(4, -1, 1, x.shape[1], *tail)
    y = y - y.mean(dim=0)
    y = (y.square().mean(dim=0) + 1e-8).sqrt()
    y = y.mean(dim=list(range(2, y.dim()))).reshape(-1, 1, *[1] * len(tail))
    return torch.cat([x, y.repeat(4, 1, *tail)], dim=1)


def trick(x: Tensor) -> Tensor:
    """The library's variance, and a statistic that is expanded rather than repeated."""
    groups = x.unflatten(0, (4, -1))
    y = (groups.var(0, unbiased=False) + 1e-8).sqrt().flatten(1).mean(1)
    y = y.repeat(4).reshape(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, y], dim=1)


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    elements = 1
    for size in shape:
        elements *= size

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        wide = (shape[0], shape[1] + 1, *shape[2:])
        x, gy = (torch.randn(s, device=_ceilings.DEVICE).contiguous(memory_format=form) for s in (shape, wide))
        inputs = (x.requires_grad_(),)
        return lambda: gradients((function(*inputs),), inputs, (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(genfast.ops.minibatch_stddev),
    }
    # float32: the forward reads x and writes y, the backward reads grad y and x and writes dx.
    name = f"minibatch_stddev {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 5 * elements, quick=quick)


CASES = [
    _case((32, 512, 4, 4), False, True),
    _case((32, 128, 32, 32), False, False),
    _case((32, 128, 32, 32), True, False),
]
