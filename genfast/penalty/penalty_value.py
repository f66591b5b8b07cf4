"""From a critic's input gradient to the penalty, its norms and its derivative by the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .settings import Penalty, Settings


def penalty_of_gradient(
    op: str, g: Tensor | None, like: Tensor, n: int, s: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(value, norms (n,), dP/dg) from g = d(sum of outputs)/dx of the n samples, which are shaped as those of
    ``like``."""
    if s.function is not None:
        return penalty_of_function(op, g, like, n, s)
    if g is None:  # the critic does not look at x
        norms = like.new_zeros(n, dtype=torch.promote_types(like.dtype, torch.float32))
        return reference.penalty_of_norms(norms, s.kind, s.weight, s.target), norms, None
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    value = reference.penalty_of_norms(norms, s.kind, s.weight, s.target)
    if s.kind in ("r1", "r2", "r1r2"):
        return value, norms, g * (s.weight / n)
    excess = norms - s.target
    if s.kind == "wgan-lp":
        excess = excess.clamp(min=0)
    # zero where the norm is: the subgradient that torch.linalg.vector_norm takes
    per_sample = torch.where(norms > 0, 2 * s.weight / n * excess / norms, 0)
    return value, norms, g * per_sample.to(g.dtype).view(-1, *(1,) * (g.dim() - 1))


def value_of_function(op: str, penalty: Penalty, gradient: Tensor) -> Tensor:
    """A penalty of the user's own as a scalar: what it is, or the mean of one value per sample."""
    value = penalty(gradient)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: penalty returned a {type(value).__name__}, expected a tensor, () or one value per sample"
        )
    n = gradient.shape[0]
    if value.numel() != 1 and not (value.shape[0] == n == value.numel()):
        raise ValueError(
            f"{op}: penalty returned shape {tuple(value.shape)} for a gradient of shape {tuple(gradient.shape)}, "
            f"expected a scalar () or one value per sample ({n},)"
        )
    return value.mean()


def penalty_of_function(
    op: str, g: Tensor | None, like: Tensor, n: int, s: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`penalty_of_gradient`, by a function of the user's own; the value keeps its graph to all but g."""
    assert s.function is not None
    zero = g is None
    if g is None:
        g = like.new_zeros((n, *like.shape[1:]))
    wide = g.detach().to(torch.promote_types(g.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    if not torch.is_grad_enabled():
        return s.weight * value_of_function(op, s.function, wide), norms, None
    wide.requires_grad_()
    with torch.enable_grad():
        value = s.weight * value_of_function(op, s.function, wide)
        others = [t for t in graph_ends(value) if t is not wide]
        u = slope_of_function(op, value, wide, bool(others))
    return value if others else value.detach(), norms, None if zero else u.to(g.dtype)


def slope_of_function(op: str, value: Tensor, gradient: Tensor, keep: bool) -> Tensor:
    """The derivative of a penalty of the user's own by the gradient that it is of."""
    (u,) = (
        torch.autograd.grad(value, gradient, retain_graph=keep, allow_unused=True) if value.requires_grad else (None,)
    )
    if u is None:
        raise ValueError(f"{op}: penalty does not depend on the gradient that it was given, expected a function of it")
    if u.is_cpu and bool(value.detach().isfinite()) and not bool(u.isfinite().all()):
        raise FloatingPointError(
            f"{op}: the derivative of penalty is not finite, though its value is; a root at a gradient of zero does "
            "that: use torch.linalg.vector_norm, or add a small number under the root"
        )
    return u


def graph_ends(value: Tensor, boundaries: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors that a backward pass from ``value`` ends in: leaves, and those of ``boundaries`` that it meets."""
    stops = {(t.grad_fn, t.output_nr): t for t in boundaries if t.grad_fn is not None}
    ends: dict[int, Tensor] = {}
    seen, queue = set(), [(value.grad_fn, value.output_nr)] if value.grad_fn is not None else []
    if value.is_leaf and value.requires_grad:
        return [value]
    while queue:
        edge = queue.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        leaf = stops.get(edge, getattr(node, "variable", None))
        if leaf is not None:
            ends[id(leaf)] = leaf
            continue
        queue += [(n, i) for n, i in node.next_functions if n is not None and (n, i) not in seen]
    return list(ends.values())


def check_finite(op: str, value: Tensor, norms: Tensor) -> None:
    if norms.is_cuda:  # to look would wait for the GPU, and the value is not finite either
        return
    if not math.isfinite(float(value.detach())):
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        which = (
            f"{len(bad)} of {len(norms)} samples (the first is sample {bad[0]})"
            if bad
            else "any sample alone, but for all"
        )
        raise FloatingPointError(
            f"{op}: the critic's input gradient is not finite for {which}: its weights, its inputs or the loss have "
            "diverged"
        )
