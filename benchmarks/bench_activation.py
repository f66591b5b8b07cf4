"""What a gradient penalty needs of an activation: leaky relu with its signs, and the second-order rule of a smooth
one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _ceilings
from benchmarks._case import Case, Work
from genfast.ops.activation import activation_chain, activation_second, apply_bits, leaky_relu_bits


def leaky(x: Tensor, grad: Tensor) -> list[Tensor]:
    """Forward and backward as autograd does them, which keeps x."""
    return [F.leaky_relu(x, 0.2), torch.ops.aten.leaky_relu_backward(grad, x, 0.2, False)]


def leaky_bits(x: Tensor, grad: Tensor) -> list[Tensor]:
    y, bits = leaky_relu_bits(x, 0.2)
    return [y, apply_bits(grad, bits, 0.2)]


def silu(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Tangent and second-order backward of silu, as one writes them."""
    p = torch.sigmoid(x)
    slope = p * (1 - p)
    first = p + x * slope
    return [tangent * first, cotangent * first + grad * tangent * slope * (2 + x * (1 - 2 * p))]


def gelu(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Tangent and second-order backward of gelu, as one writes them."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    first = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    return [tangent * first, cotangent * first + grad * tangent * (2 - x * x) * density]


def _fused(kind: str):  # type: ignore[no-untyped-def]
    def function(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor) -> list[Tensor]:
        return [activation_chain(x, tangent, kind), activation_second(x, grad, tangent, cotangent, kind)]

    return function


def _case(name: str, shape: tuple[int, ...], plain, ours, inputs: int, moved: float, quick: bool) -> Case:  # type: ignore[no-untyped-def]
    def work(function) -> Work:  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        arguments = [torch.randn(shape, device=_ceilings.DEVICE) for _ in range(inputs)]
        return lambda: function(*arguments)

    providers = {
        "reference": lambda: work(plain),
        "compile": lambda: work(torch.compile(plain, dynamic=False)),
        "genfast": lambda: work(ours),
    }
    return Case(f"{name} {shape}", providers, bytes=int(moved * math.prod(shape)), quick=quick)


# float32: leaky relu reads and writes twice, and an eighth of a byte twice; the smooth pair reads two and four, writes
# two.
CASES = [
    _case("leaky_relu_bits", (32, 64, 16, 16), leaky, leaky_bits, 2, 16.25, True),
    _case("leaky_relu_bits", (16, 64, 128, 128), leaky, leaky_bits, 2, 16.25, False),
    _case("activation_second silu", (32, 64, 16, 16), silu, _fused("silu"), 4, 32, True),
    _case("activation_second gelu", (256, 512), gelu, _fused("gelu"), 4, 32, False),
]
