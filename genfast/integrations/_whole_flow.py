"""A whole flow of another library as one program: what the lowering of zuko's and of nflows' flows share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.flow_lowering import WholeFlow
from ..programs import FlowBuilder, LoweringError
from ..programs.flow_program import Rows
from ._class_swap import covered, of_library, plain_call
from ._masked_networks import activation_name

WHAT = "the whole flow's log_prob as one call"
# Settings of the libraries' modules that are lists, dicts or objects, and that the libraries never change in place.
UNCHANGED = frozenset(
    {"_genfast", "univariate", "shapes", "_keys", "cache", "lower_indices", "upper_indices", "diag_indices", "degrees"}
)


def whole_log_prob(
    module: Any,
    roots: list[nn.Module],
    lowering: Callable[[FlowBuilder], None],
    plain: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    x: Tensor,
    context: Tensor | None,
) -> Tensor | None:
    """log p(x) of rows (N, D) with contexts (N, K), or None where the layers must be called one by one."""
    if not covered(x, context) or not x.is_cpu:
        return None
    whole: WholeFlow = module.kept().setdefault("whole", WholeFlow(UNCHANGED))
    found = whole(roots, lowering, plain, x, context)
    return None if found is None else found[1]


def reason(inputs: int | None, contexts: int, lowering: Callable[[FlowBuilder], None]) -> str:
    """Why a flow is called layer by layer, or empty."""
    if inputs is None:
        return "layer by layer: the number of its features is not known"
    try:
        lowering(FlowBuilder(inputs, contexts))
    except LoweringError as error:
        return f"layer by layer: {error}"
    return ""


def check(module: nn.Module) -> None:
    """Raises where a call of ``module`` is another than its library wrote."""
    if not plain_call(module) or not of_library(module):
        raise LoweringError(f"{type(module).__name__} has hooks or overrides methods of its library's class")


def activation(function: Any) -> str:
    """The program's name of an activation."""
    name = activation_name(function)
    if name is None:
        shown = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", function)
        raise LoweringError(f"the activation {shown} has no step of a flow program")
    return name


def dense(builder: FlowBuilder, linear: Any, sources: Rows, **options: Any) -> Rows:
    """A linear layer, masked where it has a mask."""
    check(linear)
    mask: Tensor | None = getattr(linear, "mask", None)
    if mask is not None and mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise LoweringError(f"the mask of {type(linear).__name__} holds more than 0 and 1")
    return builder.linear(linear.weight, linear.bias, sources, mask=mask, **options)


def active(builder: FlowBuilder, name: str, rows: Rows) -> Rows:
    """The rows of an activation."""
    return rows if name == "none" else builder.point(name, rows)


def no_dropout(dropout: Any) -> None:
    """Raises where a dropout layer is active."""
    if dropout.p > 0 and dropout.training:
        raise LoweringError("dropout is active")
