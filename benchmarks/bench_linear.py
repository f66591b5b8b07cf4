"""The three products of a linear layer of a critic, with a leaky relu and its signs: forward, to the input, to the
weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _ceilings
from benchmarks._case import Case, Work
from genfast.ops.linear import linear, linear_input, linear_weight

SLOPE = 0.2


def eager(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, sign: Tensor) -> list[Tensor]:
    """What the three passes of a penalty multiply, by the library; ``sign`` is a tensor that the masked pass keeps."""
    y = F.leaky_relu(F.linear(x, weight, bias), SLOPE)
    return [y, torch.ops.aten.leaky_relu_backward(grad @ weight, sign, SLOPE, False), grad.t() @ x]


def _case(n: int, k: int, m: int, quick: bool) -> Case:
    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        shapes = ((n, k), (m, k), (m,), (n, m), (n, k))
        return [torch.randn(s, device=_ceilings.DEVICE) for s in shapes]

    def library(compiled: bool) -> Work:
        arguments = inputs()
        function = torch.compile(eager, dynamic=False) if compiled else eager
        return lambda: function(*arguments)

    def ours() -> Work:
        x, weight, bias, grad, sign = inputs()
        bits = linear(sign, torch.eye(k, device=sign.device), None, SLOPE)[1]
        return lambda: [
            linear(x, weight, bias, SLOPE)[0],
            linear_input(grad, weight, bits, SLOPE),
            linear_weight(grad, x),
        ]

    providers = {"reference": lambda: library(False), "compile": lambda: library(True), "genfast": ours}
    return Case(f"linear ({n}, {k}, {m})", providers, flops=6 * n * k * m, quick=quick)


CASES = [
    _case(256, 512, 512, True),
    _case(256, 2, 512, False),
    _case(64, 1024, 1024, False),
    _case(2048, 2048, 2048, False),
]
