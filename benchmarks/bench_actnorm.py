"""Activation normalisation, forward and backward with the log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes."""
    s, b = log_scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
    return x * s.exp() + b, (log_scale.sum() * x.shape[2] * x.shape[3]).expand(x.shape[0])


def trick(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply and add in one call."""
    s, b = log_scale.exp().reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
    return torch.addcmul(b, x, s), (log_scale.sum() * x.shape[2] * x.shape[3]).expand(x.shape[0])


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    elements = shape[0] * shape[1] * shape[2] * shape[3]

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x, gy = (torch.randn(shape, device=device).contiguous(memory_format=form) for _ in range(2))
        log_scale, bias, gl = (torch.randn(n, device=device) for n in (shape[1], shape[1], shape[0]))
        inputs = (x.requires_grad_(), log_scale.mul_(0.1).requires_grad_(), bias.requires_grad_())
        return lambda: gradients(function(*inputs), inputs, (gy, gl))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(lambda x, s, b: genfast.ops.actnorm(x, s, b, log_scale=True)),
    }
    # float32: the forward reads x and writes y, the backward reads grad y and x and writes dx.
    name = f"actnorm {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 5 * elements, quick=quick)


CASES = [
    _case((64, 48, 16, 16), False, True),
    _case((64, 48, 16, 16), True, False),
    _case((256, 12, 32, 32), False, False),
]
