"""Penalties of critics that no rule can follow: double backward by PyTorch, and finite differences where that is
missing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .critic import attach
from .penalty_value import graph_ends, penalty_of_gradient, slope_of_function, value_of_function
from .settings import Call, Critic, Settings
from .state import State, facts, restored, unwrapped
from .tape import Unsupported


def _finite_difference(
    call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings
) -> tuple[Tensor, Tensor]:
    """The exact value, and gradients from the critic at two points beside x: ordinary passes forward and back.

    d<u, grad S>/dtheta = d(S(x + e u) - S(x - e u))/dtheta / 2 e + O(e^2), with buffers and random numbers as in the
    first pass. A last pass at x tells whether they were: it must repeat the first, and leaves the state that one pass
    leaves.
    """
    n = len(x)
    inner = [c.detach().requires_grad_() if c.requires_grad else c for c in context]
    outer = {id(i): c for i, c in zip(inner, context)}

    def outputs(at: Tensor) -> Tensor:
        with torch.enable_grad():
            return call.read(critic(at, *inner), n)

    with restored(critic) as restore:
        at = x.detach().requires_grad_()
        first = outputs(at)
        with torch.enable_grad():
            total = first.sum() * call.each(first, n)
        (g,) = torch.autograd.grad(total, at, allow_unused=True) if total.requires_grad else (None,)
        first = first.detach()
        del total
        value, norms, u = penalty_of_gradient(call.op, g, x, n, s)
        if u is None or not torch.is_grad_enabled():
            return value, norms
        step = torch.finfo(x.dtype).eps ** (1 / 3)
        e = step * x.detach().abs().max().clamp(min=1) / u.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        slopes: dict[int, tuple[Tensor, Tensor]] = {}
        for sign in (1, -1):
            restore()
            at = (x.detach() + sign * e * u).requires_grad_()
            beside = outputs(at)
            with torch.enable_grad():
                end = beside.sum(dtype=torch.promote_types(beside.dtype, torch.float32)) * call.each(beside, n)
            del beside
            if not end.requires_grad:
                continue
            # Gradients are taken now, since the next pass may write to buffers that this one's graph has kept; what is
            # kept of a graph that others made stays theirs.
            ends = graph_ends(end, (at, *inner))
            for leaf, slope in zip(ends, torch.autograd.grad(end, ends, allow_unused=True, retain_graph=True)):
                leaf = x if leaf is at else outer.get(id(leaf), leaf)
                if slope is None or not leaf.requires_grad:
                    continue
                slope = slope * (sign / (2 * e)).to(slope.dtype)
                slopes[id(leaf)] = (leaf, slopes[id(leaf)][1] + slope if id(leaf) in slopes else slope)
            del end
        restore()
        _check_repeats(call.op, first, outputs(x.detach().requires_grad_()).detach())
        return attach(value, list(slopes.values()), critic), norms


def rounding_error(like: Tensor) -> float:
    """What two orders of the same sums may differ by, relative to the largest result."""
    if like.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        return 2.0**-8
    device, dtype = like.device.type, like.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.finfo(dtype).eps * (128 if dtype in (torch.float32, torch.float64) else 4)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of ``a``; infinite where shapes, or numbers that are not
    finite, differ."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.detach().double(), b.detach().double()
    size = a.abs().max()
    if not bool(size.isfinite()):
        return 0.0 if bool(torch.equal(a.nan_to_num(), b.nan_to_num())) else math.inf
    return float((a - b).abs().max() / size.clamp(min=1e-300))


def _check_repeats(op: str, first: Tensor, again: Tensor) -> None:
    if not bool(first.isfinite().all()):  # the value is not finite either, which is told elsewhere
        return
    off = relative_difference(first, again)
    if not off <= rounding_error(first):
        raise RuntimeError(
            f"{op}: finite differences need a critic that repeats its outputs, and two passes over the same samples, "
            f"with buffers and random numbers put back, differ by {off:.1e} of their size: it keeps a state that "
            "cannot be put back. Give the module itself where critic is a function around it, or set it to eval(), "
            "or use method='autograd'"
        )


def call_critic(op: str, critic: Critic, name: str, x: Tensor, context: Sequence[Tensor]) -> Any:
    """What the critic returns, or its error together with what it was given."""
    try:
        return critic(x, *context)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if type(error) not in (RuntimeError, ValueError, TypeError, IndexError):
            raise
        what = f"{name} of shape {tuple(x.shape)} and dtype {x.dtype}"
        if context:
            what += " with context of shape " + ", ".join(str(tuple(c.shape)) for c in context)
        raise type(error)(f"{op}: the critic raised for {what}: {error}") from error


def _double_backward(
    call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings
) -> tuple[Tensor, Tensor]:
    original = unwrapped(critic)

    def checked(at: Tensor, *rest: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            d: Tensor = call.read(call_critic(call.op, original, "samples", at, rest), len(x))
        return d * call.each(d, len(x)) if call.patches == "mean" else d

    def own(g: Tensor) -> Tensor:
        assert s.function is not None
        value = value_of_function(call.op, s.function, g.to(torch.promote_types(g.dtype, torch.float32)))
        if g.requires_grad and torch.is_grad_enabled():
            slope_of_function(call.op, value, g, True)
        return value

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        value, norms = reference.gradient_penalty(
            checked, x, s.kind, s.weight, s.target, context, None if s.function is None else own
        )
    return value, norms.detach()


_MISSING = ("not implemented", "double backward", "higher order", "once_differentiable", "no autograd formula")


def fallback_penalty(
    call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings
) -> tuple[Tensor, Tensor]:
    """Double backward by PyTorch; where that is not implemented, finite differences."""
    known = facts(critic)
    if s.method == "finite-difference" or (known.finite_differences and s.method != "autograd"):
        return _finite_difference(call, critic, x, context, s)
    restore = None if known.differentiated_twice else State(critic)
    try:
        value, norms = _double_backward(call, critic, x, context, s)
        if s.method == "auto" and value.requires_grad and not known.differentiated_twice:
            # a missing second derivative shows only now
            with restored(critic) as put_back:  # a checkpoint runs a part of the critic once more
                torch.autograd.grad(value, graph_ends(value, (x, *context)), retain_graph=True, allow_unused=True)
                put_back()
            known.differentiated_twice = True
        return value, norms
    except (NotImplementedError, RuntimeError) as error:
        if s.method == "autograd" or not any(words in str(error) for words in _MISSING):
            raise
        reason = str(error)
    if restore is not None:
        restore()
    known.finite_differences = True
    warnings.warn(
        f"{call.op}: PyTorch has no double backward here ({reason}); finite differences are used", stacklevel=4
    )
    return _finite_difference(call, critic, x, context, s)


def report_unsupported(op: str, critic: Critic, error: Exception, s: Settings) -> None:
    """What to do where the rules end, and the plain way works: raise if they were asked for, else say so once a
    critic."""
    reason = str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
    if s.method == "exact":
        raise Unsupported(f"{op}: method='exact' cannot follow this critic: {reason}") from error
    known = facts(critic)
    if known.unsupported is None:
        known.unsupported = reason
        warnings.warn(
            f"{op}: double backward is used for this critic, since its exact form cannot be followed: {reason}; "
            "genfast.explain(critic, example) shows its rules",
            stacklevel=4,
        )


def failure_of_rules(op: str, critic: Critic, error: Exception, s: Settings) -> Exception:
    """An exception of the exact form, after which the plain way is tried: what that raises is the caller's own
    error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):  # the plain way takes more
        raise error
    if s.method == "exact":
        if isinstance(error, Unsupported):
            report_unsupported(op, critic, error, s)
        return error
    inner: BaseException | None = error
    while inner is not None:  # the frames hold the record
        inner = inner.with_traceback(None).__context__
    return error
