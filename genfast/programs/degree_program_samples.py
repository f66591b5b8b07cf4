"""Sample calls of ops.autoregressive_inverse. They stand here and not with the op, since they are made of degree
programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._registry import Sample
from ..ops.autoregressive_inverse import OP, TAILS
from ..ops.spline import derivative_count
from .degree_program import DegreeProgram, Layer


def samples(generator: torch.Generator) -> Iterator[Sample]:
    def rand(*shape: int, scale: float = 0.5) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def layer(read: Tensor, made: Tensor, bias: bool = True, **more: Any) -> Layer:
        return Layer(rand(len(made), len(read)), rand(len(made)) if bias else None, made[:, None] >= read, **more)

    def sample(label: str, n: int, layers: list[Layer], transform: str, *options: float) -> Sample:
        program = DegreeProgram.build(layers)
        z = torch.rand((n, program.inputs), generator=generator, dtype=torch.float64)
        return Sample(label, (z, program.packed(), program.statics(z.dtype), program.code, transform, list(options)))

    def degrees(inputs: int, *hidden: int) -> list[Tensor]:
        """Of the inputs, of hidden units and of two parameters an input."""
        rest = [torch.arange(h) % max(1, inputs - 1) for h in hidden]
        return [torch.arange(inputs), *rest, torch.arange(inputs).repeat_interleave(2) - 1]

    x, h, k, out = degrees(5, 19, 23)
    layers = [layer(x, h, after="relu"), layer(h, k, after="relu"), layer(k, out)]
    yield sample("two hidden layers", 21, layers, "affine:softclamp", 0, 0, math.log(1e-3))
    yield sample("few samples", 3, layers, "affine:exp", 1, 1, 0)
    x, h, k, out = degrees(4, 9, 9)
    static = [rand(9, 9), rand(9, 9)]
    layers = [
        layer(x, h, context=static[0]),
        layer(h, h, before="tanh", after="silu", bias=False),
        layer(h, h, after="gelu", residual=1, gate=static[1]),
        layer(h, out, before="elu"),
    ]
    yield sample("residual, context and gate", 9, layers, "affine:sigmoid2", 0, 1, 1e-3)
    x, h, out = torch.arange(6) % 2, torch.zeros(7, dtype=torch.int64), (torch.arange(6) % 2).repeat_interleave(2) - 1
    layers = [layer(x, h, after="softplus"), layer(h, out, after="leaky_relu")]
    yield sample("coupling", 18, layers, "affine:softplus", 1, 0, 1e-3)
    for tails, zuko, flip, bins in ((0, 0, 0, 4), (2, 1, 0, 3), (0, 1, 1, 2)):
        width = 2 * bins + derivative_count(bins, TAILS[tails])
        x, h, out = torch.arange(5), torch.arange(11) % 4, torch.arange(5).repeat_interleave(width) - 1
        options = (flip, bins, tails, zuko, -2, 2, -2, 2, 1e-3, 1e-3, 1e-3, 1e-3, 1)
        layers = [layer(x, h, after="tanh"), layer(h, out)]
        yield sample(f"spline {TAILS[tails]} {bins}", 20 - 8 * flip, layers, "spline", *options)
    dense = torch.rand((7, 7), generator=generator).lt(0.4).tril(-1)
    shuffled = torch.randperm(7, generator=generator)
    layers = [Layer(rand(7, 7), rand(7), dense[shuffled][:, shuffled])]
    yield sample("any acyclic mask, shift alone", 33, layers, "affine:additive", 0, 0, 0)


OP.samples = samples
