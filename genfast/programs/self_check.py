"""A program proves itself once against the network that it was made of, before anything is drawn with it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_private import fake_tensors, transform
from ..reference.masked_linear import ACTIVATIONS
from .degree_program import Layer
from .errors import LoweringError

TOLERANCE = 32 * torch.finfo(torch.float32).eps  # of the largest value: what needs no second look


class SelfCheckError(LoweringError):
    """A program computes something else than its network; names the layer where the difference begins."""


def can_look(device: torch.device) -> bool:
    """Whether numbers can be looked at: not while a CUDA graph is captured, under a tracer or with fake tensors."""
    if torch.compiler.is_compiling() or transform() is not None:
        return False
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return device.type != "meta" and not fake_tensors()


@contextlib.contextmanager
def quietly(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast or a trace in the random number generators."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def beyond_rounding(found: Tensor, expected: Tensor, exact: Callable[[], tuple[Tensor, Tensor] | None]) -> float | None:
    """How far ``found`` is from what the network gives, relative to its largest value, if rounding does not explain it.

    Args:
        exact: (output in float64, output in float32) of copies of the network, asked for only where the two differ by
            more than a few units in the last place; None where there are no copies. What these differ by is rounding.
    """
    precision, finite = expected.dtype, expected.isfinite()
    found, expected = (torch.where(finite, t.double(), 0.0) for t in (found, expected))
    scale = largest(expected)
    error = largest(found - expected)
    if error <= TOLERANCE * scale:
        return None
    outputs = exact()
    if outputs is None:
        return (
            None
            if error <= 4096 * max(torch.finfo(precision).eps, TOLERANCE / 32) * scale
            else error / max(scale, 1e-300)
        )
    double, single = (torch.where(finite, t.double(), 0.0) for t in outputs)
    own = largest(found - double)
    return None if own <= 16 * largest(single - double) + TOLERANCE * scale else own / max(scale, 1e-300)


def in_both_precisions(network: nn.Module, call: Callable[[Any, torch.dtype], Tensor]) -> tuple[Tensor, Tensor] | None:
    """``call(copy of network, dtype)`` in float64 and float32; None where the network cannot be copied or called so."""
    default = torch.get_default_dtype()
    outputs = []
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            outputs.append(call(copy.deepcopy(network).to(dtype), dtype).detach())
    except Exception:  # whatever a user's network makes of another precision
        return None
    finally:
        torch.set_default_dtype(default)
    return outputs[0], outputs[1]


def check_row(
    name: str,
    module: nn.Module,
    x: Tensor,
    logdet: Tensor,
    again: Callable[[Any, torch.dtype], tuple[Tensor, Tensor]],
    begins: Callable[[], str],
) -> None:
    """Compares one row that a degree program has solved with what the module makes of it.

    Each x_i is solved again from z_i and from what the network makes of all of x, which must give x_i.

    Args:
        x, logdet: (1, D) and (1,), solved by the program.
        again: (x, logdet) solved so with the module, or a copy of it in another dtype.
        begins: where a difference begins, in words.

    Raises:
        SelfCheckError: they differ beyond rounding.
    """
    expected = again(module, x.dtype)

    @functools.cache
    def copies() -> tuple[Tensor, Tensor] | None:
        return in_both_precisions(module, lambda m, dtype: torch.cat([t.flatten() for t in again(m, dtype)]))

    for part, found, own in ((slice(0, -1), x, expected[0]), (slice(-1, None), logdet, expected[1])):

        def both(part: slice = part) -> tuple[Tensor, Tensor] | None:
            outputs = copies()
            return None if outputs is None else (outputs[0][part], outputs[1][part])

        error = beyond_rounding(found.flatten(), own.flatten(), both)
        if error is not None:
            raise SelfCheckError(
                f"{name}: its inverse in the order of degrees differs from what its network says by {error:.2g} of "
                f"the largest x or log-determinant of one row, and the difference begins at {begins()}"
            )


def first_layer(network: nn.Module, layers: Sequence[Layer], call: Callable[[], Any], x: Tensor) -> str:
    """Which of a degree program's layers is the first that gives something else than the module whose weight it has.

    Args:
        call: calls the network at ``x`` (N, D).
    """
    names = {id(getattr(m, "weight", None)): (name, m) for name, m in network.named_modules()}
    outputs: dict[str, Tensor] = {}
    handles = []
    for layer in layers:
        name, module = names.get(id(layer.weight), ("", None))
        if module is not None:
            handles.append(
                module.register_forward_hook(
                    lambda m, _, out, name=name: outputs.setdefault(name, out.detach().clone())
                )
            )
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    values = [x]
    for i, layer in enumerate(layers, 1):
        before = ACTIVATIONS[layer.before](values[layer.source])
        weight = layer.weight if layer.mask is None else torch.where(layer.mask.bool(), layer.weight, 0.0)
        linear = F.linear(before, weight, layer.bias)
        y = ACTIVATIONS[layer.after](linear if layer.context is None else linear + layer.context)
        y = y if layer.gate is None else y * layer.gate
        values.append(y if layer.residual is None else y + values[layer.residual])
        name, _ = names.get(id(layer.weight), ("", None))
        expected = outputs.get(name)
        if expected is not None and all(
            largest(v - expected) > 128 * TOLERANCE * largest(expected) for v in (linear, y)
        ):
            return f"layer {i} ({name})"
    return f"the {len(layers)} layers, which fit their modules' outputs one by one"
