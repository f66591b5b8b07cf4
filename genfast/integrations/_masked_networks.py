"""Masked networks of other libraries: their staircases, and the layers that the degree-ordered engine takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._derived import derived, ordinary, readable, readable_now
from .._modes import evaluating
from ..nn.flow_lowering import ACTIVATIONS
from ..ops.masked_linear import Staircase, staircase_from_mask
from ..programs import DegreeProgram, Layer, self_check
from ._class_swap import covered

_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.elu: "elu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    F.softplus: "softplus",
    F.leaky_relu: "leaky_relu",
}


def activation_name(function: Any) -> str | None:
    """What our engine calls an activation; None for one that it does not have."""
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function) if callable(function) else None
    name, options = ACTIVATIONS.get(type(function), (None, {}))
    if function._forward_hooks or function._forward_pre_hooks or "forward" in function.__dict__:
        return None
    return name if all(getattr(function, option) == value for option, value in options.items()) else None


def staircase(kept: dict[Any, Any], linear: Any) -> Staircase | None:
    """The staircase of ``linear.mask``, found once for each content of the mask.

    None where it is none, where the mask weighs what it lets through (it holds more than 0 and 1), and where its
    numbers cannot be read.
    """
    mask: Tensor = linear.mask
    return derived(
        kept, ("staircase", id(linear)), (mask,), lambda: staircase_from_mask(mask) if _is_binary(mask) else None
    )


def _is_binary(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def no_staircase(linear: Any) -> bool:
    """Whether a mask that can be read is none; of a meta model nothing is known yet."""
    return readable(linear.mask) and staircase({}, linear) is None


def masked_product(kept: dict[Any, Any], linear: Any, x: Tensor, activation: str = "none") -> Tensor | None:
    """act(linear(x)) over live weights; None where the op does not cover the call."""
    if not covered(x, linear.weight, linear.bias) or not x.dim() or x.shape[-1] != linear.weight.shape[1]:
        return None
    stairs = staircase(kept, linear)
    return (
        None if stairs is None else ops.masked_linear(x, linear.weight, linear.bias, mask=stairs, activation=activation)
    )


def layer_of(linear: Any, **fields: Any) -> Layer:
    return Layer(linear.weight, linear.bias, linear.mask, **fields)


Again = Callable[[Any, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def solve(
    kept: dict[Any, Any],
    layers: Sequence[Layer],
    z: Tensor,
    transform: str,
    options: dict[str, Any],
    module: Any,
    network: nn.Module,
    again: Again,
) -> tuple[Tensor, Tensor] | None:
    """x (N, D) and log |det dx/dz| (N,) from z, through the engine; the program is made once for each set of masks.

    The first time for a program, one row is put through the module itself.

    Args:
        module: whose inverse this is; ``network`` is the part of it that the layers stand for.
        again: ``again(module or a copy, x, z, dtype)`` solves the row z (1, D) for x and logdet, with what the module's
            network makes of all of x in that dtype.

    None where masks, weights or what comes from a context cannot be read, and where a mask holds more than 0 and 1.
    """
    for layer in layers:
        if not readable(layer.weight, layer.bias, layer.mask, layer.context, layer.gate):
            return None
    for i, layer in enumerate(layers):
        mask = layer.mask
        if mask is None or mask.dtype == torch.bool:
            continue
        if not derived(kept, ("binary", i), (mask,), functools.partial(_is_binary, mask)):
            return None
    program: DegreeProgram | None = kept.get("program")
    with ordinary():
        kept["program"] = program = DegreeProgram.build(layers) if program is None else program.update(layers)
    found: tuple[Tensor, Tensor] = ops.autoregressive_inverse(z, program, transform, **options)
    settings = transform, tuple(options.items())
    proven = kept.get("proven")
    if z.numel() and (proven is None or proven[0] is not program.code or proven[1] != settings):
        if not self_check.can_look(z.device) or not readable_now(z):
            return found
        x, logdet, z = (t[:1].detach() for t in (*found, z))
        with ordinary(), self_check.quietly(z.device), evaluating(module):
            self_check.check_row(
                type(module).__name__,
                module,
                x,
                logdet,
                lambda m, dtype: again(m, x.to(dtype), z.to(dtype), dtype),
                lambda: self_check.first_layer(network, program.layers, lambda: again(module, x, z, z.dtype), x),
            )
        kept["proven"] = program.code, settings
    return found
