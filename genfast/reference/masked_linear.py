"""A linear layer whose mask is a staircase after sorting (MADE, arXiv:1502.03509, section 4): y = act(x (W o M)^T + b).

``rows`` (O) and ``columns`` (I) sort outputs and inputs, and the r-th sorted output sees the first ``counts[r]`` sorted
inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# What stands between the layers of a masked network, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "none": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def staircase(in_degrees: Tensor, out_degrees: Tensor, strict: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, counts) of the mask that is live where an output's degree >= an input's, or > if ``strict``."""
    rows, columns = out_degrees.argsort(stable=True), in_degrees.argsort(stable=True)
    counts = torch.searchsorted(in_degrees[columns], out_degrees[rows], right=not strict)
    return rows, columns, counts


def staircase_mask(rows: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """Which weights (O, I) are live, bool."""
    # Positions by sorting rather than by assignment, which vmap and the fake tensors of a compiler do not take.
    rank, seen = columns.argsort(), counts[rows.argsort()]
    return rank < seen[:, None]


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, counts: Tensor, activation: str
) -> Tensor:
    """(N, O) of x (N, I), weight (O, I) and bias (O)."""
    live = torch.where(staircase_mask(rows, columns, counts), weight, weight.new_zeros(()))
    y = F.linear(x, live, bias)
    return F.relu(y) if activation == "relu" else y


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db), each empty where it is not ``wanted``; ``y`` is the output of a relu, None without one. Dead dW are
    0."""
    mask = staircase_mask(rows, columns, counts)
    if y is not None:
        grad = torch.where(y > 0, grad, grad.new_zeros(()))
    zero = weight.new_zeros(())
    dx = grad @ torch.where(mask, weight, zero) if wanted[0] else x.new_empty(0)
    dw = torch.where(mask, grad.t() @ x, zero) if wanted[1] else x.new_empty(0)
    return dx, dw, grad.sum(0) if wanted[2] else x.new_empty(0)
