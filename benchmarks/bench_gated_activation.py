"""The gated unit with a conditioning of each sample, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor, bias: Tensor) -> Tensor:
    """What one writes."""
    f, g = (x + bias.reshape(*bias.shape, *[1] * (x.dim() - 2))).chunk(2, dim=1)
    return torch.tanh(f) * torch.sigmoid(g)


def trick(x: Tensor, bias: Tensor) -> Tensor:
    """tanh and the library's gated linear unit, which takes one half through its own sigmoid: F.glu of [tanh f | g]."""
    f, g = (x + bias.reshape(*bias.shape, *[1] * (x.dim() - 2))).chunk(2, dim=1)
    return F.glu(torch.cat((f.tanh(), g), 1), dim=1)


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    outputs = shape[0] * shape[1] // 2
    for size in shape[2:]:
        outputs *= size

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(shape, device=device).contiguous(memory_format=form).requires_grad_()
        gy = torch.randn(shape[0], shape[1] // 2, *shape[2:], device=device).contiguous(memory_format=form)
        bias = torch.randn(shape[:2], device=device, requires_grad=True)
        return lambda: gradients((function(x, bias),), (x, bias), (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(genfast.ops.gated_activation),
    }
    # float32: the forward reads both halves and writes y, the backward reads both and grad y and writes both gradients.
    name = f"gated_activation {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 8 * outputs, quick=quick)


CASES = [
    _case((16, 128, 28, 28), False, True),
    _case((8, 128, 32, 32), True, False),
    _case((4, 128, 16000), False, False),
]
