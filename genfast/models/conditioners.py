"""The networks inside couplings; the last layer of each starts at zero, so that a flow starts at the identity."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..programs import FlowBuilder, LoweringError
from ..programs.flow_program import Rows


class MLP(nn.Module):
    """Linear layers with ReLU between; the last starts at zero, so a flow starts at the identity."""

    def __init__(self, inputs: int, outputs: int, hidden: int, depth: int, context: int = 0) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * depth, outputs]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.linears[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.linears[-1].bias)  # type: ignore[arg-type]

    def add_steps(self, builder: FlowBuilder, sources: Rows, context: Rows | None) -> Rows:
        """The rows of the outputs: the forward's steps in a program."""
        *hidden, last = [cast("nn.Linear", linear) for linear in self.linears]
        _check_linear(*hidden, last)
        h = sources
        for i, linear in enumerate(hidden):
            added = _lowered_context(builder, self.context, context) if i == 0 else None
            h = builder.linear(linear.weight, linear.bias, h, activation="relu", added=added)
        return builder.linear(last.weight, last.bias, h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        *hidden, last = self.linears
        for i, linear in enumerate(hidden):
            x = linear(x)
            if i == 0:
                x = _add_context(x, self.context, context)
            x = F.relu(x, inplace=True)
        result: Tensor = last(x)
        return result


class ConvNet(nn.Module):
    """Glow's conditioner: 3x3, ReLU, 1x1, ReLU, 3x3 that starts at zero (Glow, section 4)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, context: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 1)
        self.conv3 = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = F.relu(_add_context(self.conv1(x), self.context, context), inplace=True)
        result: Tensor = self.conv3(F.relu(self.conv2(x), inplace=True))
        return result


class ResNet(nn.Module):
    """RealNVP's conditioner: a convolution, residual blocks, and a convolution that starts at zero (RealNVP, section
    3.2)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.Conv2d(hidden, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = _add_context(self.first(x), self.context, context)
        for block in self.blocks:
            first, second = block.children()
            x = x + second(F.relu(first(F.relu(x)), inplace=True))
        result: Tensor = self.last(F.relu(x))
        return result


class ResidualMLP(nn.Module):
    """A residual perceptron: linear, blocks h + W2 relu(W1 relu(h)), linear (NSF, appendix B.1). The last starts at
    zero.

    ``period`` p > 0 makes it a function of cos and sin of pi x / p, so that x and x + 2p are one point.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, blocks: int, context: int = 0, period: float = 0.0
    ) -> None:
        super().__init__()
        self.period = period
        self.first = nn.Linear(2 * inputs if period else inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.Linear(hidden, hidden), nn.Linear(hidden, hidden))) for _ in range(blocks)
        )
        self.last = nn.Linear(hidden, outputs)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def add_steps(self, builder: FlowBuilder, sources: Rows, context: Rows | None) -> Rows:
        """The rows of the outputs: the forward's steps in a program."""
        if self.period:
            raise LoweringError("ResidualMLP with a period has no step of a flow program")
        blocks = [[cast("nn.Linear", linear) for linear in block.children()] for block in self.blocks]
        _check_linear(self.first, self.last, *(linear for block in blocks for linear in block))
        added = _lowered_context(builder, self.context, context)
        h = builder.linear(self.first.weight, self.first.bias, sources, added=added)
        for before, after in blocks:
            inner = builder.linear(before.weight, before.bias, builder.point("relu", h), activation="relu")
            h = builder.linear(after.weight, after.bias, inner, added=h)
        return builder.linear(self.last.weight, self.last.bias, h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.period:
            angle = x * (math.pi / self.period)
            x = torch.cat((angle.cos(), angle.sin()), 1)
        h = _add_context(self.first(x), self.context, context)
        for block in self.blocks:
            before, after = block.children()
            h = h + after(F.relu(before(F.relu(h)), inplace=True))
        result: Tensor = self.last(h)
        return result


def _add_context(x: Tensor, projection: nn.Linear | None, context: Tensor | None) -> Tensor:
    if (projection is None) != (context is None):
        had, needs = ("no context", "one") if context is None else ("a context", "none: build the model with context=K")
        raise ValueError(f"conditioner: called with {had}, expected {needs}")
    if projection is None:
        return x
    added: Tensor = projection(context)
    return x + added.reshape(*added.shape, *([1] * (x.dim() - 2)))


def _check_linear(*layers: nn.Module) -> None:
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise LoweringError(f"{type(layer).__name__} in the place of a Linear has no step of a flow program")


def _lowered_context(builder: FlowBuilder, projection: nn.Linear | None, context: Rows | None) -> Rows | None:
    if (projection is None) != (context is None):
        raise LoweringError("a conditioner is called with another context than it was made for")
    if projection is None or context is None:
        return None
    _check_linear(projection)
    return builder.linear(projection.weight, projection.bias, context)
