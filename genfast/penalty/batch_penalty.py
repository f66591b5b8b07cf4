"""The penalty of a batch of points: by the rules, or by the fallbacks; and norms that carry a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .critic import Pass, attach, once
from .fallback import failure_of_rules, fallback_penalty, report_unsupported
from .penalty_value import graph_ends, penalty_of_gradient
from .settings import Call, Critic, Settings
from .state import State, facts, restored


def _exact(
    call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings, start: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x by the rules."""
    recorded = Pass(call.op, critic, x, context, loss=False, start=start, read=call.read, mean=call.patches == "mean")
    value, norms, u = penalty_of_gradient(call.op, recorded.input_gradient(len(x)), x, len(x), s)
    if not torch.is_grad_enabled():
        return value, norms
    warn_coupled(call.op, critic)
    to_x = recorded.sweep(u, to_x=x.requires_grad)
    collected = recorded.gradients()
    if x.requires_grad:
        collected.append((x, to_x))
    return attach(value, collected, critic), norms


def _run_penalty(
    call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x; ``plain``: the exact form has failed already."""
    known = facts(critic)
    failed: Exception | None = None
    if s.method in ("auto", "exact") and (known.unsupported is None or s.method == "exact") and not plain:
        with restored(critic) as start:
            try:
                return _exact(call, critic, x, context, s, start)
            except Exception as error:
                start()
                failed = failure_of_rules(call.op, critic, error, s)
    plain_settings = s._replace(method="autograd") if s.method == "exact" else s
    value, norms = fallback_penalty(call, critic, x, context, plain_settings)
    if failed is not None:
        report_unsupported(call.op, critic, failed, s)
    if torch.is_grad_enabled():  # a zero gradient to every parameter, as the exact form gives
        value = value + attach(torch.zeros_like(value), [], critic)
    return value, norms


def warn_coupled(op: str, critic: Critic) -> None:
    """Says once a critic that its samples are coupled, if a layer is known to couple them."""
    known = facts(critic)
    if known.warned or not known.coupling:
        return
    known.warned = True
    warnings.warn(
        f"{op}: {known.coupling} couples the samples of a batch. The result is exact for the gradient of the sum of "
        "the critic's outputs, but the norm of one sample's gradient is then not what the penalty's paper means "
        "(arXiv:1704.00028, section 4, advises layer norm)",
        stacklevel=5,
    )


class _Norms(torch.autograd.Function):
    """Norms, whose backward pass finds the gradients of their sum with the weights that it is given."""

    @staticmethod
    def forward(
        ctx: Any, norms: Tensor, again: Callable[[Tensor], Sequence[Tensor | None]], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.again, ctx.count = again, count
        ctx.save_for_backward(*tensors)  # which raises where one was written to in between
        return norms.clone()

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, ctx.again(weights.detach()))]
        if torch.is_grad_enabled():
            gradients = once(gradients, tensors[: ctx.count])
        return (None, None, None, *gradients, *[None] * (len(tensors) - ctx.count))


def _with_norms(call: Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: Settings) -> tuple[Tensor, Tensor]:
    """As :func:`_run_penalty`, with norms that carry a gradient.

    How much each norm counts is known only when a backward pass asks: it runs the critic again, from the state (buffers
    and random numbers) that this call met.
    """
    if not torch.is_grad_enabled():
        return _run_penalty(call, critic, x, context, s)
    start = State(critic)
    value, norms = _run_penalty(call, critic, x, context, s)
    if not value.requires_grad:
        return value, norms
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    ends = graph_ends(value, (x, *context))

    def again(weights: Tensor) -> Sequence[Tensor | None]:
        def weighted(g: Tensor) -> Tensor:
            norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1)
            return (weights * norms).sum()

        own = s._replace(function=weighted, weight=1.0)
        with torch.enable_grad(), torch.autocast(device, dtype, enabled), restored(critic) as put_back:
            start()
            try:
                total, _ = _run_penalty(call, critic, x, context, own)
                return torch.autograd.grad(total, ends, allow_unused=True, retain_graph=True)
            finally:
                put_back()

    result: Tensor = _Norms.apply(norms, again, len(ends), *ends, *(t for t in (x, *context) if not t.requires_grad))
    return value, result


def _ar1(
    call: Call, critic: Critic, points: Sequence[Tensor], context: Sequence[Tensor], s: Settings
) -> tuple[Tensor, Tensor]:
    d, near = (call.per_sample(call.read(critic(p, *context), len(p)), len(p)) for p in points)
    difference = (d - near).to(torch.promote_types(d.dtype, torch.float32))
    return s.weight * difference.square().mean(), difference.abs() / s.sigma


def penalty_at_points(
    call: Call,
    critic: Critic,
    points: Sequence[Tensor],
    contexts: Sequence[Sequence[Tensor]],
    s: Settings,
    differentiable: bool = False,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum over batches of points (one, or real and fake for "r1r2"; for "ar1" real and what is near it).

    differentiable: whether the norms carry a gradient. plain: the exact form has failed already.
    """
    if s.kind == "ar1":
        return _ar1(call, critic, points, contexts[0], s)
    values, norms = [], []
    for x, context in zip(points, contexts):
        if differentiable:
            value, norm = _with_norms(call, critic, x, context, s)
        else:
            value, norm = _run_penalty(call, critic, x, context, s, plain)
        values.append(value)
        norms.append(norm)
    return sum(values[1:], start=values[0]), torch.cat(norms)
