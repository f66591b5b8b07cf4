"""Comparisons of the Triton kernels of splines and masked linear layers with the float64 reference, for any device.

The interpreter (tests/triton/test_spline.py, test_masked_linear.py) runs them on small CPU tensors, tests/gpu on CUDA
tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast import reference
from genfast._registry import OPS
from genfast._verify import relative_error
from genfast.ops.spline import derivative_count
from tests.triton.flow_cases import FORWARD, GRADIENT, compare, run

KINDS = ("nflows linear", "nflows circular", "nflows none", "zuko linear")  # convention, tails


def spline(shape: tuple[int, ...], bins: int, kind: str, inverse: bool, like: dict[str, Any]) -> list[Any]:
    """Arguments of rational_quadratic_spline; some x are outside where there are tails."""
    convention, tails = kind.split()
    options = [-1.5, 2.5, -2.0, 3.0] if tails == "none" else [-2.0, 2.0, -2.0, 2.0]
    low, high = options[2:] if inverse else options[:2]
    reach = 0.98 if tails == "none" else 1.3
    x = (low + high) / 2 + (high - low) / 2 * reach * (2 * torch.rand(shape, **like) - 1)
    spread = 1.0 if bins <= 16 else 0.3  # else one steep place among many narrow bins decides the error
    logits = [spread * torch.randn((*shape, n), **like) for n in (bins, bins, derivative_count(bins, tails))]
    return [x, *logits, tails, convention, inverse, [*options, 2e-3, 1e-3, 3e-3, 1e-3, 0.9]]


def check_spline(args: list[Any], grads: tuple[Tensor | None, Tensor | None] | None = None) -> list[Tensor]:
    """Forward and backward."""
    dtype = args[0].dtype
    found = compare(OPS["rational_quadratic_spline"], tuple(args), FORWARD[dtype])
    if grads is None:
        grads = torch.randn_like(args[0]), torch.randn(args[0].shape, device=args[0].device)
    return found + compare(OPS["rational_quadratic_spline_backward"], (*grads, *args), GRADIENT[dtype])


def check_many(args: list[Any]) -> None:
    """Of so many elements some lie where the spline is so steep that float32 has few digits: as exact as plain
    float32."""
    x = args[0]
    grads = torch.randn_like(x), torch.randn(x.shape, device=x.device)
    wide = [a.double() if isinstance(a, Tensor) else a for a in (*grads, *args)]
    for name, given in (("rational_quadratic_spline", 2), ("rational_quadratic_spline_backward", 0)):
        op = OPS[name]
        plain = op.reference(*(*grads, *args)[given:])
        for f, p, e in zip(run(op, (*grads, *args)[given:]), plain, op.reference(*wide[given:]), strict=True):
            assert relative_error(f, e) <= max(GRADIENT[x.dtype], relative_error(p, e))


def check_packed(args: list[Any]) -> None:
    """The same to the bit of parameters side by side."""
    x, widths, heights, derivatives, *rest = args
    grads = torch.randn_like(x), torch.randn(x.shape, device=x.device)
    packed = (x, torch.cat([widths, heights, derivatives], -1), widths.shape[-1], *rest)
    found = run(OPS["rational_quadratic_spline"], tuple(args))
    *found_back, dw, dh, dd = run(OPS["rational_quadratic_spline_backward"], (*grads, *args))
    again = run(OPS["rational_quadratic_spline_packed"], packed)
    again += run(OPS["rational_quadratic_spline_packed_backward"], (*grads, *packed))
    for f, g in zip((*found, *found_back, torch.cat([dw, dh, dd], -1)), again, strict=True):
        assert torch.equal(f, g)


# samples, degrees of inputs and of outputs (a number: one each, in order), strictly, what else the call is made of
LAYERS: dict[str, tuple[int, Any, Any, bool, dict[str, Any]]] = {
    "one of each": (1, 1, 1, False, dict()),
    "one input": (5, 1, 7, False, dict(activation="relu")),
    "nothing is seen": (3, [5, 6, 7], [1, 2, 3, 4], False, dict(activation="relu")),
    "everything is seen": (19, [1] * 33, [2] * 21, False, dict(bias=False)),
    "first layer": (7, 13, [1 + i * 12 // 40 for i in range(40)], False, dict(activation="relu")),
    "last layer, reversed": (9, [1 + i * 12 // 40 for i in range(40)], [13 - i // 3 for i in range(39)], True, dict()),
    "shuffled": (37, "shuffled 70", "shuffled 83", False, dict(activation="relu")),
    "even tiles": (64, [1 + i // 8 for i in range(64)], [1 + i // 8 for i in range(64)], True, dict(activation="relu")),
    "many samples": (300, 9, 11, False, dict(activation="relu")),
    "many outputs": (2, 5, [1 + i // 221 for i in range(1103)], False, dict()),
    "empty batch": (0, 5, 7, False, dict(activation="relu")),
}


def _degrees(given: Any, generator: torch.Generator) -> Tensor:
    if isinstance(given, str):
        size = int(given.split()[1])
        return torch.randint(1, 30, (size,), generator=generator)
    return torch.arange(1, given + 1) if isinstance(given, int) else torch.tensor(given)


def layer(label: str, like: dict[str, Any]) -> dict[str, Any]:
    """Arguments of masked_linear by name; dead weights are NaN."""
    n, inner, outer, strict, given = LAYERS[label]
    generator = torch.Generator().manual_seed(0)
    return made(n, _degrees(inner, generator), _degrees(outer, generator), strict, like, **given)


def made(
    n: int,
    inner: Tensor,
    outer: Tensor,
    strict: bool,
    like: dict[str, Any],
    bias: bool = True,
    activation: str = "none",
) -> dict[str, Any]:
    rows, columns, counts = (t.to(like.get("device")) for t in reference.staircase(inner, outer, strict))
    weight = torch.randn((len(outer), len(inner)), **like) / math.sqrt(len(inner))
    weight = weight.masked_fill(~reference.staircase_mask(rows, columns, counts), math.nan)
    b = torch.randn(len(outer), **like) if bias else None
    x = torch.randn((n, len(inner)), **like)
    return dict(x=x, weight=weight, bias=b, rows=rows, columns=columns, counts=counts, activation=activation)


def check_layer(
    a: dict[str, Any], grad: Tensor | None = None, wanted: tuple[bool, bool, bool] = (True,) * 3
) -> list[Tensor]:
    """Forward and backward; dead weights neither reach an output nor get a gradient."""
    dtype = a["x"].dtype
    (y,) = compare(OPS["masked_linear"], tuple(a.values()), FORWARD[dtype])
    if grad is None:
        grad = torch.randn_like(y)
    kept = y if a["activation"] == "relu" else None
    args = (grad, a["x"], a["weight"], kept, a["rows"], a["columns"], a["counts"], list(wanted))
    found = compare(OPS["masked_linear_backward"], args, GRADIENT[dtype])
    if wanted[1]:
        dead = ~reference.staircase_mask(a["rows"], a["columns"], a["counts"])
        assert not found[1][dead].count_nonzero()
    return [y, *found]
