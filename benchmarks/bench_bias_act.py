"""Bias, activation, gain and clamp, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients
from genfast.reference.bias_act import ACTIVATIONS


def _apply(v: Tensor, act: str) -> Tensor:
    return F.leaky_relu(v, 0.2) if act == "lrelu" else F.silu(v)


def _case(shape: tuple[int, ...], act: str, clamp: float | None, channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    elements = 1
    for size in shape:
        elements *= size
    gain = ACTIVATIONS[act][1]

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        """What one writes."""
        y = _apply(x + bias.reshape(-1, *[1] * (x.dim() - 2)), act) * gain
        return y if clamp is None else y.clamp(-clamp, clamp)

    def trick(x: Tensor, bias: Tensor) -> Tensor:
        """The gain goes with the bias where f is linear in pieces; what may be is done in place."""
        b = bias.reshape(-1, *[1] * (x.dim() - 2))
        if act == "lrelu":
            y = F.leaky_relu_(torch.add(b * gain, x, alpha=gain), 0.2)
        else:
            y = _apply(x + b, act).mul_(gain)
        return y if clamp is None else y.clamp(-clamp, clamp)

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x, gy = (torch.randn(shape, device=device).contiguous(memory_format=form) for _ in range(2))
        inputs = (x.requires_grad_(), torch.randn(shape[1], device=device, requires_grad=True))
        return lambda: gradients((function(*inputs),), inputs, (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(lambda x, b: genfast.ops.bias_act(x, b, act=act, clamp=clamp)),
    }
    # float32: the forward reads x and writes y, the backward reads grad y and x and writes dx.
    name = f"bias_act {act}{' clamp' if clamp is not None else ''} {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 5 * elements, quick=quick)


CASES = [
    _case((32, 128, 32, 32), "lrelu", None, False, True),
    _case((32, 128, 32, 32), "lrelu", 256.0, True, False),
    _case((32, 128, 32, 32), "swish", None, False, False),
    _case((64, 512, 4, 4), "lrelu", None, False, False),
]
