"""ops.gradient_penalty and ops.critic_step: the penalty on a critic's input gradient without double backward.

The work is done by ``genfast.tangent``. In eager mode the value is given its gradients directly; under torch.compile both are
one op, ``genfast::critic_step``, whose forward finds the gradients and whose backward scales them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from .. import reference, tangent
from .._compiler import constant, uncompiled
from .._registry import LIBRARY, autograd_works
from ..reference.adversarial import CRITIC_LOSSES, SEPARABLE
from ..reference.gradient_penalty import KINDS
from . import _check

Critic = Callable[..., Tensor]
Contexts = Tensor | Sequence[Tensor] | None
METHODS = ("auto", "exact", "finite-difference", "autograd")
BATCHING = ("auto", "together", "apart")
PATCHES = ("sum", "mean")
Penalty = Callable[[Tensor], Tensor]
Output = int | str | Callable[[Any], Any] | None
RANDOM = ("wgan-gp", "wgan-lp", "dragan", "ar1")  # whose points are drawn


class CriticLoss(NamedTuple):
    """What :func:`critic_step` found. Only ``loss`` carries a gradient.

    loss: adversarial + penalty, ().
    adversarial, penalty: its parts, ().
    real_logits, fake_logits: (N,), or (N, ...) with ``patches``.
    norms: of the critic's gradient at each of the penalty's points, (N,), or (2 N,) for "r1r2"; empty without one.
    """

    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    norms: Tensor


class _Settings(NamedTuple):
    """How the penalty is made of the gradient; ``function`` is one of the user's own."""

    kind: str
    weight: float
    target: float
    method: str
    sigma: float
    function: Penalty | None = None


_NO_PENALTY = _Settings("", 0.0, 0.0, "auto", 0.0)


class _Call(NamedTuple):
    """The op that was called, and how it takes the critic's outputs out of what the critic returns."""

    op: str
    output: Output = None
    patches: str | None = None

    def read(self, result: Any, n: int) -> Tensor:
        """The outputs, (n, ...)."""
        if self.output is not None:
            result = self._select(result)
        if self.patches == "sum" and isinstance(result, (tuple, list)) and result:
            parts = [tangent.per_sample_outputs(self.op, part, n, True) for part in result]
            return torch.cat([part.reshape(n, -1) for part in parts], 1)
        return tangent.per_sample_outputs(self.op, result, n, self.patches is not None)

    def _select(self, result: Any) -> Any:
        output, what = self.output, type(result).__name__
        if isinstance(output, int):
            if not isinstance(result, (tuple, list)):
                raise TypeError(
                    f"{self.op}: output={output} is an index, and critic returned a {what}, expected a tuple or list"
                )
            if not -len(result) <= output < len(result):
                raise ValueError(f"{self.op}: output={output}, and critic returned a {what} of {len(result)}")
            return result[output]
        if isinstance(output, str):
            if isinstance(result, Mapping):
                if output not in result:
                    raise ValueError(f"{self.op}: output={output!r}, and critic returned the keys {sorted(map(str, result))}")
                return result[output]
            if isinstance(result, Tensor) or not hasattr(result, output):
                raise TypeError(
                    f"{self.op}: output={output!r} is a key, and critic returned a {what}, expected a mapping or what has that "
                    "attribute"
                )
            return getattr(result, output)
        assert callable(output)
        return output(result)

    def each(self, d: Tensor, n: int) -> float:
        """How much each output counts in S, whose gradient is penalised."""
        return n / d.numel() if self.patches == "mean" else 1.0

    def per_sample(self, d: Tensor, n: int) -> Tensor:
        """Each sample's share of S, (n,)."""
        return d.reshape(-1) if d.numel() == n else d.reshape(n, -1).sum(1) * self.each(d, n)

    def logits(self, d: Tensor, n: int) -> Tensor:
        """What losses take: (n,), or (n, ...) where a sample has several; float32 or better."""
        wide = d.to(torch.promote_types(d.dtype, torch.float32))
        return wide.reshape(-1) if d.numel() == n else wide


# ---- from gradients to the penalty ----


def _penalty(op: str, g: Tensor | None, like: Tensor, n: int, s: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(value, norms (n,), dP/dg) from g = d(sum of outputs)/dx of the n samples, which are shaped as those of ``like``."""
    if s.function is not None:
        return _own_penalty(op, g, like, n, s)
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


def _value(op: str, penalty: Penalty, gradient: Tensor) -> Tensor:
    """A penalty of the user's own as a scalar: what it is, or the mean of one value per sample."""
    value = penalty(gradient)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: penalty returned a {type(value).__name__}, expected a tensor, () or one value per sample")
    n = gradient.shape[0]
    if value.numel() != 1 and not (value.shape[0] == n == value.numel()):
        raise ValueError(
            f"{op}: penalty returned shape {tuple(value.shape)} for a gradient of shape {tuple(gradient.shape)}, expected a "
            f"scalar () or one value per sample ({n},)"
        )
    return value.mean()


def _own_penalty(op: str, g: Tensor | None, like: Tensor, n: int, s: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`_penalty`, by a function of the user's own; the value keeps the graph to what that depends on besides g."""
    assert s.function is not None
    zero = g is None
    if g is None:
        g = like.new_zeros((n, *like.shape[1:]))
    wide = g.detach().to(torch.promote_types(g.dtype, torch.float32))
    norms = torch.linalg.vector_norm(wide.flatten(1), dim=1)
    if not torch.is_grad_enabled():
        return s.weight * _value(op, s.function, wide), norms, None
    wide.requires_grad_()
    with torch.enable_grad():
        value = s.weight * _value(op, s.function, wide)
        others = [t for t in _ends(value) if t is not wide]
        u = _slope(op, value, wide, bool(others))
    return value if others else value.detach(), norms, None if zero else u.to(g.dtype)


def _slope(op: str, value: Tensor, gradient: Tensor, keep: bool) -> Tensor:
    """The derivative of a penalty of the user's own by the gradient that it is of."""
    (u,) = torch.autograd.grad(value, gradient, retain_graph=keep, allow_unused=True) if value.requires_grad else (None,)
    if u is None:
        raise ValueError(f"{op}: penalty does not depend on the gradient that it was given, expected a function of it")
    if u.is_cpu and bool(value.detach().isfinite()) and not bool(u.isfinite().all()):
        raise FloatingPointError(
            f"{op}: the derivative of penalty is not finite, though its value is; a root at a gradient of zero does that: use "
            "torch.linalg.vector_norm, or add a small number under the root"
        )
    return u


def _ends(value: Tensor, boundaries: Sequence[Tensor] = ()) -> list[Tensor]:
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


def _check_finite(op: str, value: Tensor, norms: Tensor) -> None:
    if norms.is_cuda:  # to look would wait for the GPU, and the value is not finite either
        return
    if not math.isfinite(float(value.detach())):
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        which = f"{len(bad)} of {len(norms)} samples (the first is sample {bad[0]})" if bad else "any sample alone, but for all"
        raise FloatingPointError(
            f"{op}: the critic's input gradient is not finite for {which}: its weights, its inputs or the loss have diverged"
        )


# ---- the ladder ----


def _finite_difference(
    call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings
) -> tuple[Tensor, Tensor]:
    """The exact value, and gradients from the critic at two points beside x: ordinary passes forward and back.

    d<u, grad S>/dtheta = d(S(x + e u) - S(x - e u))/dtheta / 2 e + O(e^2), with buffers and random numbers as in the first
    pass. A last pass at x tells whether they were: it must repeat the first, and leaves the state that one pass leaves.
    """
    n = len(x)
    inner = [c.detach().requires_grad_() if c.requires_grad else c for c in context]
    outer = {id(i): c for i, c in zip(inner, context)}

    def outputs(at: Tensor) -> Tensor:
        with torch.enable_grad():
            return call.read(critic(at, *inner), n)

    with tangent.restored(critic) as restore:
        at = x.detach().requires_grad_()
        first = outputs(at)
        with torch.enable_grad():
            total = first.sum() * call.each(first, n)
        (g,) = torch.autograd.grad(total, at, allow_unused=True) if total.requires_grad else (None,)
        first = first.detach()
        del total
        value, norms, u = _penalty(call.op, g, x, n, s)
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
            # Gradients are taken now, since the next pass may write to buffers that this one's graph has kept; what is kept
            # of a graph that others made stays theirs.
            ends = _ends(end, (at, *inner))
            for leaf, slope in zip(ends, torch.autograd.grad(end, ends, allow_unused=True, retain_graph=True)):
                leaf = x if leaf is at else outer.get(id(leaf), leaf)
                if slope is None or not leaf.requires_grad:
                    continue
                slope = slope * (sign / (2 * e)).to(slope.dtype)
                slopes[id(leaf)] = (leaf, slopes[id(leaf)][1] + slope if id(leaf) in slopes else slope)
            del end
        restore()
        _check_repeats(call.op, first, outputs(x.detach().requires_grad_()).detach())
        return tangent.attach(value, list(slopes.values()), critic), norms


def _rounding(like: Tensor) -> float:
    """What two orders of the same sums may differ by, relative to the largest result."""
    if like.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        return 2.0**-8
    device, dtype = like.device.type, like.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.finfo(dtype).eps * (128 if dtype in (torch.float32, torch.float64) else 4)


def _apart_by(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of ``a``; infinite where shapes, or numbers that are not finite,
    differ."""
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
    off = _apart_by(first, again)
    if not off <= _rounding(first):
        raise RuntimeError(
            f"{op}: finite differences need a critic that repeats its outputs, and two passes over the same samples, with "
            f"buffers and random numbers put back, differ by {off:.1e} of their size: it keeps a state that cannot be put "
            "back. Give the module itself where critic is a function around it, or set it to eval(), or use method='autograd'"
        )


def _called(op: str, critic: Critic, name: str, x: Tensor, context: Sequence[Tensor]) -> Any:
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


def _double_backward(call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    original = tangent.unwrapped(critic)

    def checked(at: Tensor, *rest: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            d: Tensor = call.read(_called(call.op, original, "samples", at, rest), len(x))
        return d * call.each(d, len(x)) if call.patches == "mean" else d

    def own(g: Tensor) -> Tensor:
        assert s.function is not None
        value = _value(call.op, s.function, g.to(torch.promote_types(g.dtype, torch.float32)))
        if g.requires_grad and torch.is_grad_enabled():
            _slope(call.op, value, g, True)
        return value

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        value, norms = reference.gradient_penalty(
            checked, x, s.kind, s.weight, s.target, context, None if s.function is None else own
        )
    return value, norms.detach()


_MISSING = ("not implemented", "double backward", "higher order", "once_differentiable", "no autograd formula")


def _fallback(call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    """Double backward by PyTorch; where that is not implemented, finite differences."""
    known = tangent.facts(critic)
    if s.method == "finite-difference" or (known.finite_differences and s.method != "autograd"):
        return _finite_difference(call, critic, x, context, s)
    restore = None if known.differentiated_twice else tangent.State(critic)
    try:
        value, norms = _double_backward(call, critic, x, context, s)
        if s.method == "auto" and value.requires_grad and not known.differentiated_twice:
            # a missing second derivative shows only now
            with tangent.restored(critic) as put_back:  # a checkpoint runs a part of the critic once more
                torch.autograd.grad(value, _ends(value, (x, *context)), retain_graph=True, allow_unused=True)
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
    warnings.warn(f"{call.op}: PyTorch has no double backward here ({reason}); finite differences are used", stacklevel=4)
    return _finite_difference(call, critic, x, context, s)


def _unsupported(op: str, critic: Critic, error: Exception, s: _Settings) -> None:
    """What to do where the rules end, and the plain way works: raise if they were asked for, else say so once a critic."""
    reason = str(error) if isinstance(error, tangent.Unsupported) else f"{type(error).__name__}: {error}"
    if s.method == "exact":
        raise tangent.Unsupported(f"{op}: method='exact' cannot follow this critic: {reason}") from error
    known = tangent.facts(critic)
    if known.unsupported is None:
        known.unsupported = reason
        warnings.warn(
            f"{op}: double backward is used for this critic, since its exact form cannot be followed: {reason}; "
            "genfast.explain(critic, example) shows its rules",
            stacklevel=4,
        )


def _failure(op: str, critic: Critic, error: Exception, s: _Settings) -> Exception:
    """An exception of the exact form, after which the plain way is tried: what that raises is the caller's own error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):  # the plain way takes more
        raise error
    if s.method == "exact":
        if isinstance(error, tangent.Unsupported):
            _unsupported(op, critic, error, s)
        return error
    inner: BaseException | None = error
    while inner is not None:  # the frames hold the record
        inner = inner.with_traceback(None).__context__
    return error


def _exact(
    call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings, start: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x by the rules."""
    recorded = tangent.Pass(
        call.op, critic, x, context, loss=False, start=start, read=call.read, mean=call.patches == "mean"
    )  # fmt: skip
    value, norms, u = _penalty(call.op, recorded.input_gradient(len(x)), x, len(x), s)
    if not torch.is_grad_enabled():
        return value, norms
    _warn_coupled(call.op, critic)
    to_x = recorded.sweep(u, to_x=x.requires_grad)
    collected = recorded.gradients()
    if x.requires_grad:
        collected.append((x, to_x))
    return tangent.attach(value, collected, critic), norms


def _run_penalty(
    call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings, plain: bool = False
) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x; ``plain``: the exact form has failed already."""
    known = tangent.facts(critic)
    failed: Exception | None = None
    if s.method in ("auto", "exact") and (known.unsupported is None or s.method == "exact") and not plain:
        with tangent.restored(critic) as start:
            try:
                return _exact(call, critic, x, context, s, start)
            except Exception as error:
                start()
                failed = _failure(call.op, critic, error, s)
    plain_settings = s._replace(method="autograd") if s.method == "exact" else s
    value, norms = _fallback(call, critic, x, context, plain_settings)
    if failed is not None:
        _unsupported(call.op, critic, failed, s)
    if torch.is_grad_enabled():  # a zero gradient to every parameter, as the exact form gives
        value = value + tangent.attach(torch.zeros_like(value), [], critic)
    return value, norms


def _warn_coupled(op: str, critic: Critic) -> None:
    """Says once a critic that its samples are coupled, if a layer is known to couple them."""
    known = tangent.facts(critic)
    if known.warned or not known.coupling:
        return
    known.warned = True
    warnings.warn(
        f"{op}: {known.coupling} couples the samples of a batch. The result is exact for the gradient of the sum of the "
        "critic's outputs, but the norm of one sample's gradient is then not what the penalty's paper means "
        "(arXiv:1704.00028, section 4, advises layer norm)",
        stacklevel=5,
    )


# ---- norms with a gradient ----


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
        gradients = [
            torch.zeros_like(t) if g is None else g for t, g in zip(tensors, ctx.again(weights.detach()))
        ]  # fmt: skip
        if torch.is_grad_enabled():
            gradients = tangent.once(gradients, tensors[: ctx.count])
        return (None, None, None, *gradients, *[None] * (len(tensors) - ctx.count))


def _with_norms(
    call: _Call, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`_run_penalty`, with norms that carry a gradient.

    How much each norm counts is known only when a backward pass asks: it runs the critic again, from the state (buffers and
    random numbers) that this call met.
    """
    if not torch.is_grad_enabled():
        return _run_penalty(call, critic, x, context, s)
    start = tangent.State(critic)
    value, norms = _run_penalty(call, critic, x, context, s)
    if not value.requires_grad:
        return value, norms
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    ends = _ends(value, (x, *context))

    def again(weights: Tensor) -> Sequence[Tensor | None]:
        def weighted(g: Tensor) -> Tensor:
            norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1)
            return (weights * norms).sum()

        own = s._replace(function=weighted, weight=1.0)
        with torch.enable_grad(), torch.autocast(device, dtype, enabled), tangent.restored(critic) as put_back:
            start()
            try:
                total, _ = _run_penalty(call, critic, x, context, own)
                return torch.autograd.grad(total, ends, allow_unused=True, retain_graph=True)
            finally:
                put_back()

    result: Tensor = _Norms.apply(norms, again, len(ends), *ends, *(t for t in (x, *context) if not t.requires_grad))
    return value, result


# ---- the steps, eager ----


def _ar1(
    call: _Call, critic: Critic, points: Sequence[Tensor], context: Sequence[Tensor], s: _Settings
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d, near = (call.per_sample(call.read(critic(p, *context), len(p)), len(p)) for p in points)
    difference = (d - near).to(torch.promote_types(d.dtype, torch.float32))
    return s.weight * difference.square().mean(), difference.abs() / s.sigma


def _penalty_only(
    call: _Call, critic: Critic, points: Sequence[Tensor], contexts: Sequence[Sequence[Tensor]], s: _Settings,
    differentiable: bool = False, plain: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def _check_loss(op: str, value: Any, logits: Tensor) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{op}: loss returned {what}, expected a scalar of (real_logits, fake_logits)")
    if logits.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(f"{op}: loss does not depend on the logits that it was given, expected a function of them")


def _slopes(op: str, loss: Callable[[Tensor, Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dreal, dloss/dfake); the loss keeps the graph to what it depends on besides the logits."""
    with torch.inference_mode(False), torch.enable_grad():
        r, f = (x.detach().clone() if x.is_inference() else x.detach() for x in (real, fake))
        value = loss(r.requires_grad_(), f.requires_grad_())
        _check_loss(op, value, r)
        others = any(t is not r and t is not f for t in _ends(value)) if loss not in CRITIC_LOSSES.values() else False
        slopes = torch.autograd.grad(value.sum(), (r, f), retain_graph=others, materialize_grads=True)
        value = value.reshape(()) if others else value.detach().reshape(())
    return value, slopes[0], slopes[1]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        return torch.cat(list(tensors))


def _step(
    call: _Call, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]], loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None,
    batching: str,
) -> CriticLoss:  # fmt: skip
    op = call.op
    known = tangent.facts(critic)
    failed: Exception | None = None
    exact = (s is None or s.kind != "ar1") and (s is None or s.method in ("auto", "exact"))
    if exact and (known.unsupported is None or (s is not None and s.method == "exact")):
        with tangent.restored(critic) as restore:
            try:
                step = None
                # On a CPU one batch after another meets warmer caches, and takes less memory.
                if batching == "together" or (batching == "auto" and not real.is_cpu):
                    step = _stacked(call, critic, real, fake, at, contexts, loss, s, restore, batching)
                if step is None:
                    step = _separate(call, critic, real, fake, at, contexts, loss, s, restore, batching)
                return step
            except Exception as error:
                restore()
                failed = _failure(op, critic, error, s or _NO_PENALTY)
    d_real, d_fake = (
        call.logits(call.read(_called(op, critic, name, x, c), len(x)), len(x))
        for name, x, c in zip(("real", "fake"), (real, fake), contexts)
    )
    adversarial = loss(d_real, d_fake)
    _check_loss(op, adversarial, d_real)
    adversarial = adversarial.reshape(())
    penalty, norms = adversarial.new_zeros(()), adversarial.new_zeros(0)
    if s is not None:
        points, chosen = _points(real, fake, at, contexts, s.kind)
        penalty, norms = _penalty_only(call, critic, points, chosen, s, plain=failed is not None)
        _check_finite(op, penalty, norms)
    if failed is not None:
        _unsupported(op, critic, failed, s or _NO_PENALTY)
    return CriticLoss(
        adversarial + penalty, adversarial.detach(), penalty.detach(), d_real.detach(), d_fake.detach(), norms.detach()
    )


def _points(
    real: Tensor, fake: Tensor, at: Tensor | None, contexts: Sequence[Sequence[Tensor]], kind: str
) -> tuple[list[Tensor], list[Sequence[Tensor]]]:
    if kind == "r1r2":
        return [real, fake], list(contexts)
    if kind == "r2":
        return [fake], [contexts[1]]
    if kind == "ar1":
        assert at is not None
        return [real, at], [contexts[0]]
    return [real if at is None else at], [contexts[0]]


Part = tuple[Tensor, Sequence[Tensor]]  # points and their context


def _stackable(parts: Sequence[Part]) -> str:
    """Why these cannot go through the critic as one batch, or ""."""
    (first, context), *others = parts
    for x, c in others:
        if x.dtype != first.dtype or x.shape[1:] != first.shape[1:] or len(c) != len(context):
            return "real and fake differ in shape, dtype or context"
        for x_c, first_c in zip(c, context):
            if x_c.dtype != first_c.dtype or x_c.shape[1:] != first_c.shape[1:]:
                return "the contexts of real and fake differ in shape or dtype"
    if any(c.dim() == 0 or c.shape[0] != len(x) for x, cs in parts for c in cs):
        return "a context has not one row per sample"
    return ""


def _joined(
    call: _Call, critic: Critic, parts: Sequence[Part], restore: Callable[[], None], batching: str,
    into: dict[int, tuple[Tensor, Tensor, bool]] | None, loss: bool = True,
) -> tangent.Pass | None:  # fmt: skip
    """A pass over all parts as one batch; None if they must go through the critic apart.

    What the record shows (a rule that mixes samples, a value that leaves its sight) forbids it. What no record shows, such as
    a number made of the batch's size, is looked for by a comparison with the parts' own outputs, once for each structure.
    """
    known = tangent.facts(critic)
    # A function may be a new one at each call, which would pay for a comparison each time; a module is the same one again, and
    # its first call goes the way of the later ones, so that a run that is resumed repeats the bits of one that was not.
    if batching == "auto" and (known.moves or (known.apart is None and not isinstance(critic, nn.Module))):
        return None
    recorded: tangent.Pass | None = None
    unlike = _stackable(parts)
    reason = unlike or known.separate
    if not reason:
        x, context = _stack([p for p, _ in parts]), [_stack(c) for c in zip(*(c for _, c in parts))]

        def record() -> tangent.Pass:
            return tangent.Pass(
                call.op, critic, x, context, loss=loss, start=restore, into=into, read=call.read, mean=call.patches == "mean"
            )

        recorded = record()
        tape = recorded.tape
        output = getattr(call.output, "__code__", call.output)
        key = (tuple(map(type, tape.rules)), output, call.patches, tuple(len(p) for p, _ in parts), x.shape, x.dtype,
               torch.is_autocast_enabled(x.device.type))  # fmt: skip
        if not tape.joinable:
            why = f"by {tape.escaped}, which is not recorded" if tape.escaped else f"by {known.coupling or 'one of its layers'}"
            reason = f"its samples may meet {why}"
        elif key not in known.joined:
            recorded = None
            restore()
            reason = _compare(call, critic, parts, restore, batching)
            if not reason and (batching == "together" or not known.moves):
                known.joined.add(key)
                recorded = record()
    if reason:
        if recorded is not None:
            recorded = None
            restore()
        if not unlike:
            known.separate = reason
        if batching == "together" and not known.warned_separate:
            known.warned_separate = True
            warnings.warn(
                f"{call.op}: batching='together' is not followed for this critic: {reason}; real, fake and interpolated "
                "samples are batches of their own",
                stacklevel=5,
            )
    return recorded


class _Undropped(TorchFunctionMode):
    """Runs dropout as in evaluation, so that the batches of a random critic can be compared."""

    FUNCTIONS = frozenset(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, torch.dropout,
         torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout, torch.rrelu)
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FUNCTIONS:
            bound = {"inplace": kwargs.pop("inplace", False), **kwargs}
            if func in (F.rrelu, torch.rrelu):
                bounds = (*args[1:3], *(bound[k] for k in ("lower", "upper") if k in bound))
                slope = sum(bounds) / 2 if len(bounds) == 2 else (1 / 8 + 1 / 3) / 2
                return F.leaky_relu(args[0] if args else kwargs["input"], slope)
            return (args[0] if args else kwargs["input"]) * 1
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        elif func is F.multi_head_attention_forward:
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
            elif len(args) > 10:
                args = (*args[:10], 0.0, *args[11:])
        return func(*args, **kwargs)


def _compare(call: _Call, critic: Critic, parts: Sequence[Part], restore: Callable[[], None], batching: str) -> str:
    """Why parts may not be joined, or "": their outputs as one batch beside those of each, from the same state."""
    known = tangent.facts(critic)
    original = tangent.unwrapped(critic)
    # Equal batches would have equal means, and hide that the critic subtracts one.
    unlike = [_unlike(i, x, context) for i, (x, context) in enumerate(parts)]

    def outputs(x: Tensor, context: Sequence[Tensor]) -> Tensor:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            return call.read(original(x.detach().requires_grad_(), *context), len(x)).detach()

    x, context = torch.cat([p for p, _ in unlike]), [torch.cat(c) for c in zip(*(c for _, c in unlike))]
    before = tangent.State(critic)
    outputs(x, context)
    known.moves = known.moves or before.moved()
    if known.moves and batching == "auto":
        restore()
        return ""
    results = []
    with _Undropped():
        for p, c in [(x, context), *unlike]:
            restore()
            results.append(outputs(p, c))
    restore()
    joined, separate = results[0], torch.cat(results[1:])
    off = _apart_by(separate, joined)
    if off <= _rounding(separate):
        return ""
    return f"its outputs for one batch of all samples differ from those of separate batches by {off:.1e} of their size"


def _unlike(i: int, x: Tensor, context: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The ``i``-th part made unlike the others, by changes that a critic takes for data like any other."""
    factor = 0.5**i
    changed = [c * factor if c.is_floating_point() else c[:1].expand_as(c) if i else c for c in context]
    return x.detach() * factor, [c.detach() for c in changed]


def _stacked(
    call: _Call, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]], loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None,
    restore: Callable[[], None], batching: str,
) -> CriticLoss | None:  # fmt: skip
    """All points as one batch, those of the penalty first; None if the critic wants them apart."""
    op = call.op
    n, m = real.shape[0], fake.shape[0]
    kind = s.kind if s is not None else ""
    parts: list[Part] = [(real, contexts[0]), (fake, contexts[1])]
    if kind == "r2":
        parts.reverse()
    elif at is not None:
        parts.insert(0, (at, contexts[0]))
    rows = 0 if s is None else n + m if kind == "r1r2" else parts[0][0].shape[0]
    recorded = _joined(call, critic, parts, restore, batching, None)
    if recorded is None:
        return None
    values = recorded.values
    total_rows = len(values)
    # else the loss needs a chain of its own
    shared = recorded.tape.per_sample and (values.dim() == 1 or not rows)
    first = rows if at is not None else 0
    d_real, d_fake = values[first : first + n], values[first + n :]
    if kind == "r2":
        d_fake, d_real = values[:m], values[m:]
    adversarial, *order = _slopes(op, loss, d_real, d_fake)
    x = recorded.x
    wants_x = x.requires_grad
    if kind == "r2":
        order.reverse()
    if at is not None:
        order.insert(0, values.new_zeros((rows, *values.shape[1:])))
    slope = torch.cat(order)
    g = None
    if shared:
        g = recorded.input_gradient(rows, slope, all_of_x=wants_x)
    elif rows:
        g = recorded.input_gradient(total_rows)
    penalty, norms, u = adversarial.new_zeros(()), adversarial.new_zeros(0), None
    if s is not None:
        own = None if g is None else g[:rows]
        if kind == "r1r2":  # two means
            halves = [(slice(0, n), n), (slice(n, n + m), m)]
            results = [_penalty(op, None if own is None else own[part], real, count, s) for part, count in halves]
            penalty, norms = results[0][0] + results[1][0], torch.cat([r[1] for r in results])
            u = None if own is None else torch.cat([r[2] for r in results if r[2] is not None])
        else:
            penalty, norms, u = _penalty(op, own, real, rows, s)
        _check_finite(op, penalty, norms)
    if u is not None and not shared and rows < total_rows:
        u = torch.cat([u, u.new_zeros((total_rows - rows, *u.shape[1:]))])
    total = adversarial + penalty
    if torch.is_grad_enabled():
        to_x = recorded.sweep(u, None if shared else slope, to_x=wants_x)
        collected = recorded.gradients()
        if wants_x:
            collected.append((x, to_x))
        total = tangent.attach(total, collected, critic)
    return CriticLoss(total, adversarial.detach(), penalty.detach(), d_real, d_fake, norms)


def _separate(
    call: _Call, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]], loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None,
    restore: Callable[[], None], batching: str,
) -> CriticLoss:  # fmt: skip
    """One batch after another: real, fake, points of the penalty; real and fake as one for "auto", where they may be."""
    op = call.op
    kind = s.kind if s is not None else ""
    penalised = {"r1": [0], "r2": [1], "r1r2": [0, 1]}.get(kind, [] if s is None else [2])
    gradients: dict[int, tuple[Tensor, Tensor, bool]] = {}
    to_inputs: list[tuple[Tensor, Tensor | None]] = []
    penalties, norms = [], []
    wanted = torch.is_grad_enabled()

    def record(x: Tensor, context: Sequence[Tensor], has_loss: bool) -> tangent.Pass:
        return tangent.Pass(
            op, critic, x, context, loss=has_loss and wanted, into=gradients, read=call.read,
            mean=call.patches == "mean",
        )  # fmt: skip

    def finish(x: Tensor, recorded: tangent.Pass, slope: Tensor | None, has_penalty: bool) -> None:
        """The sweeps over one of the passes; its record is dropped."""
        shared = slope is not None and recorded.tape.per_sample and (slope.dim() == 1 or not has_penalty)
        u: Tensor | None = None
        if has_penalty:
            assert s is not None
            g = recorded.input_gradient(len(x), slope if shared else None, all_of_x=x.requires_grad)
            value, norm, u = _penalty(op, g, x, len(x), s)
            _check_finite(op, value, norm)
            penalties.append(value)
            norms.append(norm)
        elif wanted and shared:
            recorded.input_gradient(0, slope, all_of_x=x.requires_grad)
        if wanted:
            to_x = recorded.sweep(u, None if shared else slope, to_x=x.requires_grad)
            if x.requires_grad:
                to_inputs.append((x, to_x))
        del recorded.tape

    values: list[Tensor] = []
    # Without a penalty of their own, real and fake samples may be one batch.
    if batching == "auto" and not {0, 1} & set(penalised):
        both = _joined(
            call, critic, [(real, contexts[0]), (fake, contexts[1])], restore, batching, gradients, loss=wanted
        )  # fmt: skip
        if both is not None:
            values = list(both.values.split([len(real), len(fake)]))
            adversarial, *slopes = _slopes(op, loss, *values)
            finish(both.x, both, torch.cat(slopes), False)
            del both
    if not values:
        waiting: list[tangent.Pass] = []
        for i, (x, c) in enumerate(((real, contexts[0]), (fake, contexts[1]))):
            recorded = record(x, c, True)
            values.append(recorded.values)
            if any(loss is f for f in SEPARABLE):
                finish(x, recorded, _slopes(op, loss, values[i], values[i])[1 + i], i in penalised)
            else:
                waiting.append(recorded)
        adversarial, *slopes = _slopes(op, loss, *values)
        if waiting:
            for i, (x, slope) in enumerate(zip((real, fake), slopes)):
                finish(x, waiting[i], slope, i in penalised)
            waiting.clear()
    if at is not None:
        finish(at, record(at, contexts[0], False), None, True)
    penalty = sum(penalties, start=adversarial.new_zeros(()))
    total = adversarial + penalty
    if wanted:
        if penalised:
            _warn_coupled(op, critic)
        collected = [(tensor, gradient) for tensor, gradient, _ in gradients.values()]
        total = tangent.attach(total, collected + to_inputs, critic)
    return CriticLoss(
        total,
        adversarial.detach(),
        penalty.detach(),
        values[0],
        values[1],
        torch.cat(norms) if norms else adversarial.new_zeros(0),
    )


# ---- critics that are spread over processes ----


class _Whole(nn.Module):
    """Stands for the module in a DistributedDataParallel during one step, so that the step is one forward pass to it.

    Then its reducer sees which parameters the result depends on, not what single passes over the critic show of it.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        # under the names that they have there
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules

    def forward(self, *points: Tensor) -> Any:
        return self.run(*points)


def _whole(op: str, critic: Critic, run: Callable[..., Any], *points: Tensor) -> Any:
    """``run(module, *points)`` with the plain module of a critic, as one forward pass of the wrapper that it may be in."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return run(critic, *points)
    _check_sharded(op, critic)
    wrapper = tangent.unwrapped(critic)
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return run(critic, *points)
    if wrapper.mixed_precision is not None:
        raise ValueError(
            f"{op}: critic is a DistributedDataParallel with mixed_precision, expected one without; use torch.autocast"
        )
    module = wrapper.module
    wrapper.module = _Whole(module, functools.partial(run, module))
    try:
        return wrapper(*points)
    finally:
        wrapper.module = module


_whole_uncompiled = uncompiled("its DistributedDataParallel looks for unused parameters")(_whole)
_norms_uncompiled = uncompiled(
    "gradient_penalty: return_norms=True, whose norms carry a gradient; 'detached' compiles as one graph"
)(_whole)
_patches_uncompiled = uncompiled("critic_step: the number of patches is not known before the call")(_whole)


def _traceable(critic: Critic) -> bool:
    """Whether torch.compile may take the step for one op, which hides from a reducer what its result depends on."""
    if not isinstance(critic, nn.parallel.DistributedDataParallel):
        return True
    return not (critic.find_unused_parameters or critic.static_graph)


def _check_sharded(op: str, critic: Critic) -> None:
    """Raises where a critic, or a part of it, gathers its weights in hooks that no penalty can pass through."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(critic, nn.Module):
        return
    for name, part in critic.named_modules():
        if isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            which = f"its part {name!r} is" if name else "it is"
            raise ValueError(
                f"{op}: critic gathers weights on its own, since {which} sharded (fully_shard); leave the critic whole, call "
                f"{op} in the forward of a module that holds it, and shard that: fully_shard(objective)"
            )


# ---- one op, for torch.compile ----

_NUMBERS = itertools.count()
_REGISTERED: dict[int, Any] = {}


@constant
def _number(thing: Any) -> int:
    """A number by which the op finds a critic or a loss again."""
    for number, found in _REGISTERED.items():
        if found() is thing:
            return number
    number = next(_NUMBERS)
    if isinstance(thing, nn.Module):
        _REGISTERED[number] = weakref.ref(thing, lambda _: _REGISTERED.pop(number, None))
    else:  # a function may live nowhere but in what is compiled
        _REGISTERED[number] = lambda: thing
    return number


LIBRARY.define(
    "critic_step(Tensor[] points, Tensor[] contexts, Tensor[] parameters, Tensor[] buffers, int critic, int loss, "
    "int real_contexts, str kind, float weight, float target, str method, float sigma, int penalty, int output, str patches, "
    "str batching, ScalarType? autocast, bool[] wanted) -> (Tensor loss, Tensor adversarial, Tensor penalty, "
    "Tensor real_logits, Tensor fake_logits, Tensor norms, Tensor[] gradients, Tensor[] buffers)"
)


def _op(
    points: list[Tensor], contexts: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], number: int, loss: int,
    real_contexts: int, kind: str, weight: float, target: float, method: str, sigma: float, penalty: int, output: int,
    patches: str, batching: str, autocast: torch.dtype | None, wanted: list[bool],
) -> Any:  # fmt: skip
    critic = _REGISTERED[number]()
    call = _Call(
        "critic_step" if loss >= 0 else "gradient_penalty", _REGISTERED[output]() if output >= 0 else None, patches or None
    )
    function = _REGISTERED[penalty]() if penalty >= 0 else None
    s = _Settings(kind, weight, target, method, sigma, function) if kind else None
    _check_sharded(call.op, critic)
    with autograd_works(), torch.enable_grad():
        if function is not None:
            like = torch.ones_like(points[0], dtype=torch.promote_types(points[0].dtype, torch.float32))
            _check_alone(call.op, "penalty", function(like))
        adversarial = _REGISTERED[loss]() if loss >= 0 else None
        if adversarial is not None and adversarial not in CRITIC_LOSSES.values():
            logits = [x.new_ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) for x in points[:2]]
            _check_alone(call.op, "loss", adversarial(*logits))
        leaves = [p.detach().requires_grad_() for p in parameters]
        copies = [x.detach().requires_grad_(w) for x, w in zip((*points, *contexts), wanted)]
        xs, cs = copies[: len(points)], copies[len(points) :]
        kept = [b.clone() for b in buffers]
        names = dict(zip((n for n, p in critic.named_parameters() if p.requires_grad), leaves))
        names |= {n: b for (n, _), b in zip(critic.named_buffers(), kept)}
        device = xs[0].device.type
        cast = torch.autocast(device, dtype=autocast) if autocast is not None else contextlib.nullcontext()
        with _reparametrize_module(critic, names, tie_weights=True), cast:
            sets = (cs[:real_contexts], cs[real_contexts:])
            if loss < 0:
                assert s is not None
                value, norms = _penalty_only(call, critic, xs, sets, s)
                none = norms.new_zeros(len(xs[0]))  # not empty: two empty outputs would pass for aliases of each other
                found = CriticLoss(value, value, value, none, none, norms)
            else:
                assert adversarial is not None
                at = xs[2] if len(xs) > 2 else None
                found = _step(call, critic, xs[0], xs[1], at, sets, adversarial, s, batching)
        inputs = [*(x for x in copies if x.requires_grad), *leaves]
        grads = dict(zip(map(id, inputs), torch.autograd.grad(found.loss, inputs, allow_unused=True)))
        after = [names[n] for n, _ in critic.named_buffers()]
    gradients = [_own(grads.get(id(x)), x) for x in (*copies, *leaves)]
    dtype = torch.promote_types(points[0].dtype, torch.float32)
    return *(t.detach().to(dtype).clone() for t in found), gradients, [b.detach() for b in after]


def _check_alone(op: str, name: str, value: Any) -> None:
    """Raises where a function of the user's own, of constants here, depends on more, which the compiled op would not see."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{op}: {name} depends on tensors that require a gradient, and under torch.compile none would reach them; "
            f"call {op} outside of what is compiled"
        )


def _own(g: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in memory of its own, as the outputs of an op must be; zeros for None."""
    if g is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    whole = g.is_contiguous() and g.untyped_storage().nbytes() == g.nbytes
    return g.detach() if whole else g.clone(memory_format=torch.contiguous_format)


def _op_fake(
    points: list[Tensor], contexts: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], number: int, loss: int,
    real_contexts: int, kind: str, *_: Any,
) -> Any:  # fmt: skip
    dtype = torch.promote_types(points[0].dtype, torch.float32)
    n = points[0].shape[0]
    norms = 0 if not kind else sum(p.shape[0] for p in points[:2]) if kind == "r1r2" else n
    if loss >= 0 and kind == "r2":
        norms = points[1].shape[0]
    sizes = [(), (), (), (n,), (points[1].shape[0] if loss >= 0 else n,), (norms,)]
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*points, *contexts, *parameters)]
    return *(points[0].new_empty(size, dtype=dtype) for size in sizes), like, [torch.empty_like(b) for b in buffers]


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.counts = [len(x) for x in inputs[:4]]
    ctx.save_for_backward(*output[6])


def _op_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    points, contexts, parameters, buffers = ctx.counts
    scaled = [g * grad.to(g.dtype) if g.is_floating_point() else None for g in ctx.saved_tensors]
    return (
        scaled[:points], scaled[points : points + contexts], scaled[points + contexts :], [None] * buffers,
        *[None] * 14,
    )  # fmt: skip


LIBRARY.impl("critic_step", _op, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::critic_step", _op_fake, lib=LIBRARY)
torch.library.register_autograd("genfast::critic_step", _op_backward, setup_context=_op_setup, lib=LIBRARY)


def _compiled(
    call: _Call, critic: Critic, points: list[Tensor], contexts: tuple[Sequence[Tensor], Sequence[Tensor]], loss: int,
    s: _Settings | None, batching: str = "auto",
) -> CriticLoss:  # fmt: skip
    op = call.op
    if not isinstance(critic, nn.Module):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}; under torch.compile it must be a torch.nn.Module")
    device = points[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    s = s or _NO_PENALTY
    parameters, buffers = [p for p in critic.parameters() if p.requires_grad], list(critic.buffers())
    flat = [*contexts[0], *contexts[1]]
    *found, _, after = torch.ops.genfast.critic_step(
        points, flat, parameters, buffers, _number(critic), loss, len(contexts[0]), s.kind, s.weight, s.target, s.method,
        s.sigma, -1 if s.function is None else _number(s.function), -1 if call.output is None else _number(call.output),
        call.patches or "", batching, autocast, [x.requires_grad for x in (*points, *flat)],
    )  # fmt: skip
    with torch.no_grad():
        for b, new in zip(buffers, after):
            b.copy_(new)
    return CriticLoss(found[0], *(x.detach() for x in found[1:]))


# ---- the functions ----


def _context(op: str, name: str, context: Contexts) -> tuple[Tensor, ...]:
    found = () if context is None else (context,) if isinstance(context, Tensor) else tuple(context)
    for c in found:
        if not isinstance(c, Tensor):
            raise TypeError(f"{op}: {name} holds a {type(c).__name__}, expected tensors")
    return found


def _check_inputs(
    call: _Call, critic: Any, real: Any, fake: Any, kind: str | None, method: str, function: Any, sigma: float
) -> None:
    op = call.op
    if not callable(critic):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}, expected a callable of (x, *context)")
    name = "penalty" if op == "critic_step" and function is None else "kind"
    if kind is not None:
        _check.choice(op, name, kind, KINDS)
    if function is not None:
        if not callable(function):
            raise TypeError(f"{op}: penalty is a {type(function).__name__}, expected a function of the gradient (N, ...)")
        if kind == "ar1":
            raise ValueError(f"{op}: kind='ar1' takes no gradient that penalty could be a function of, expected another kind")
    _check.choice(op, "method", method, METHODS)
    if call.output is not None and (
        isinstance(call.output, bool) or not (isinstance(call.output, (int, str)) or callable(call.output))
    ):
        raise TypeError(f"{op}: output is a {type(call.output).__name__}, expected an index, a key or a function")
    if call.patches is not None:
        _check.choice(op, "patches", call.patches, PATCHES)
    if kind == "ar1" and not sigma > 0:
        raise ValueError(f"{op}: sigma={sigma}, expected a positive number")
    _check.floating(op, real=real, fake=fake)
    needs = kind in ("wgan-gp", "wgan-lp", "r2", "r1r2")
    if fake is None and needs:
        raise ValueError(f"{op}: fake is None, and {name}={kind!r} needs it")
    for name, x in (("real", real), ("fake", fake)):
        if x is not None and (x.dim() < 1 or x.shape[0] == 0):
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (N, ...) with at least one sample")
    if fake is not None and kind in ("wgan-gp", "wgan-lp") and (fake.shape != real.shape or fake.dtype != real.dtype):
        raise ValueError(
            f"{op}: fake has shape {tuple(fake.shape)} and dtype {fake.dtype}, expected those of real: {tuple(real.shape)}, "
            f"{real.dtype} (each sample is interpolated with one of the other)"
        )


def _numbers(op: str, weight: Any, target: Any, function: Penalty | None) -> tuple[float, float]:
    """The weight, by default 10, or 1 for a penalty of the user's own, and the target."""
    for name, x in (("weight", weight), ("target", target)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{op}: {name} requires a gradient, and none would reach it; multiply the result by it, or give penalty= a "
                "function that uses it"
            )
    return float((10.0 if function is None else 1.0) if weight is None else weight), float(target)


def _random_points(
    op: str, real: Tensor, fake: Tensor | None, kind: str, generator: Any, epsilon: Tensor | None, points: Tensor | None,
    sigma: float,
) -> Tensor:  # fmt: skip
    """What :func:`reference.penalty_points` draws, or ``points``."""
    if points is None:
        if epsilon is not None and kind in RANDOM:
            if kind not in ("wgan-gp", "wgan-lp"):
                raise ValueError(f"{op}: epsilon was given, and {kind!r} interpolates nothing, expected wgan-gp or wgan-lp")
            _check.floating(op, real=real, epsilon=epsilon)
            if epsilon.numel() != real.shape[0]:
                raise ValueError(
                    f"{op}: epsilon has shape {tuple(epsilon.shape)}, expected one number per sample: ({real.shape[0]},); "
                    "other points go in points="
                )
            epsilon = epsilon.to(real.dtype)
        return reference.penalty_points(real, fake, kind, generator, epsilon, sigma)
    if kind not in RANDOM:
        raise ValueError(f"{op}: points were given, and {kind!r} draws none, expected a penalty of {', '.join(RANDOM)}")
    _check.floating(op, points=points)
    if points.shape != real.shape or points.dtype != real.dtype:
        raise ValueError(
            f"{op}: points have shape {tuple(points.shape)} and dtype {points.dtype}, expected those of real: "
            f"{tuple(real.shape)}, {real.dtype}"
        )
    return points


def gradient_penalty(
    critic: Critic, real: Tensor, fake: Tensor | None = None, *, kind: str = "wgan-gp", weight: float | None = None,
    target: float = 1.0, context: Contexts = None, fake_context: Contexts = None, epsilon: Tensor | None = None,
    points: Tensor | None = None, generator: torch.Generator | None = None, method: str = "auto", sigma: float = 0.01,
    return_norms: bool | str = False, penalty: Penalty | None = None, output: Output = None, patches: str | None = None,
) -> Any:  # fmt: skip
    """The penalty on a critic's input gradient, with its exact gradients, in first-order work.

    With g_n the gradient of the sum of the critic's outputs by sample n, and ||.|| over all but the batch axis:

    - "wgan-gp": weight mean (||g|| - target)^2 at eps real + (1 - eps) fake, one eps ~ U[0, 1] a sample (arXiv:1704.00028);
    - "wgan-lp": weight mean max(0, ||g|| - target)^2 at the same points (arXiv:1709.08894);
    - "r1", "r2": weight / 2 mean ||g||^2 on real, or on fake (arXiv:1801.04406); "r1r2" their sum (arXiv:2501.05441);
    - "dragan": as wgan-gp at real + a std(real) U / 2 (arXiv:1705.07215);
    - "ar1": weight mean (D(x) - D(x + sigma noise))^2 on real (arXiv:2501.08316), first order in everything, an estimate of
      R1 whose weight is gamma / (2 sigma^2).

    Args:
        critic: a module, or any callable, of (x, *context) that returns one value per sample, (N,), (N, 1), ..., or what
            ``output`` and ``patches`` make that of.
        real, fake: (N, ...) floating point. Gradients go to those that require them.
        weight: lambda, or gamma for R1 and R2; by default 10, and 1 with ``penalty``.
        context: a tensor or several, given to the critic after x; for "r2", of fake.
        fake_context: what goes with fake in "r1r2"; ``context`` by default.
        epsilon: (N,), instead of random ones.
        points: (N, ...), those of the penalties that draw some, instead of random ones: eps real + (1 - eps) fake, or
            real + sigma noise for "ar1".
        generator: draws the random numbers.
        method: "exact" by the rules of ``genfast.tangent``, or an error that says what has none; "finite-difference", two more
            passes forward and back, for critics of opaque kernels (error about 1e-4 in float32); "autograd", PyTorch's double
            backward; "auto" takes the first of exact, autograd and finite-difference that works, and warns if that is not the
            first. The first call that meets a function without a rule of ours, or a checkpoint, compares the exact form with
            double backward, and takes the latter where they differ. ``genfast.explain(critic)`` prints the rule of each part.
        sigma: the step of "ar1".
        return_norms: also returns the norms, (N,). They carry a gradient, so that a loss may be made of them; to find it, their
            backward pass runs the critic once more, from the buffers and random numbers that this call met. "detached": without
            one.
        penalty: a penalty of your own, in place of that of ``kind``, which then says only where the gradient is taken: a
            function of g (N, ...), in float32 or better, that returns (N,), of which the mean is taken, or a scalar. It may use
            other tensors that require a gradient (a multiplier that is learnt). WGAN-div (arXiv:1712.01026) is
            ``kind="r1r2", penalty=lambda g: k / 2 * g.flatten(1).square().sum(1) ** (p / 2)``; with norms by pixel it is
            ``lambda g: (g.norm(dim=1) - 1).square().flatten(1).mean(1)``.
        output: what to take of a critic that returns several things: an index of a tuple or list, a key of a mapping (or the
            name of an attribute), or a function of what it returned.
        patches: for critics with several outputs a sample, such as PatchGAN's (N, 1, h, w): "sum", as
            autograd.grad with ones for grad_outputs takes it, or "mean". With "sum" what ``output`` takes may also be a tuple
            or list of tensors, of several scales.

    Returns:
        (), float32 or better, or (penalty, norms). Differentiable once; its gradient is exact where activations are
        differentiable, and takes the subgradients that autograd takes elsewhere. Where ||g|| = 0 it is zero.

    Layers that couple samples (batch norm in training, minibatch deviation) get the gradient of the summed outputs, which is
    what double backward gives too, and a warning. Under torch.autocast products run in bfloat16; under a float16 autocast the
    penalty runs in float32, so that no loss scale is needed inside it: scale the total loss as usual.

    Random numbers are drawn as by the plain code: those of the points first, then the critic's own in one forward pass, so that
    dropout masks are the same for the same seed. Passes beside that one (finite differences, a first one that turned out not to
    do) meet the same numbers, and leave none drawn.

    Over several processes give the critic as it is wrapped in DistributedDataParallel: this is one forward pass to it (in
    torch.compile without graph breaks only if it looks for no unused parameters). Or call this in the forward of a module that
    is wrapped, or sharded by fully_shard as a whole. The value is the mean over this rank's samples; ranks with equally many
    then get the gradient of one process on all of them, given the same points. Where samples are coupled they are so within a
    rank: through layers, and in "dragan", whose std is that of this rank's ``real`` (give it ``points`` of the whole batch).

    Raises:
        TypeError, ValueError: arguments that do not fit, critics that return anything but one value per sample (the message
            names ``output`` or ``patches``), critics that are sharded apart from the module that calls this.
        RuntimeError: finite differences of a critic that does not repeat its outputs with its buffers and random numbers put
            back; a second derivative.
        FloatingPointError: norms that are not finite, on this rank; on a GPU, which is not waited for, the value is not finite
            either.
        genfast.tangent.Unsupported: with method="exact".

    Source: Gulrajani et al. 2017 (arXiv:1704.00028, section 4); Etmann 2019 (arXiv:1906.06637) for the work it takes.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> genfast.ops.gradient_penalty(critic, torch.randn(32, 2), torch.randn(32, 2)).backward()
    """
    call = _Call("gradient_penalty", output, patches)
    op = call.op
    _check_inputs(call, critic, real, fake, kind, method, penalty, sigma)
    if not isinstance(return_norms, bool):
        _check.choice(op, "return_norms", return_norms, ("detached",))
    s = _Settings(kind, *_numbers(op, weight, target, penalty), method, float(sigma), penalty)
    first = _context(op, "context", context)
    second = first if fake_context is None else _context(op, "fake_context", fake_context)
    if kind == "r1r2" and points is None:
        assert fake is not None
        at, contexts = [real, fake], (first, second)
    else:
        at, contexts = [_random_points(op, real, fake, kind, generator, epsilon, points, sigma)], (first, ())
        if kind == "ar1":
            at.insert(0, real)
    differentiable = return_norms is True
    compiling = torch.compiler.is_compiling()
    if compiling and kind != "ar1" and _traceable(critic) and not differentiable:
        step = _compiled(call, critic, at, contexts, -1, s)
        value, norms = step.loss, step.norms
    else:
        count = len(at)

        def run(module: Critic, *moved: Tensor) -> tuple[Tensor, Tensor]:
            sets = moved[count : count + len(contexts[0])], moved[count + len(contexts[0]) :]
            value, norms = _penalty_only(call, module, moved[:count], sets, s, differentiable)
            _check_finite(op, value, norms)
            return value, norms if differentiable else norms.detach()

        whole = _whole
        if compiling and kind != "ar1":
            whole = _whole_uncompiled if not _traceable(critic) else _norms_uncompiled
        value, norms = whole(op, critic, run, *at, *contexts[0], *contexts[1])
    return (value, norms) if return_norms else value


def critic_step(
    critic: Critic, real: Tensor, fake: Tensor, *, loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein",
    penalty: str | Penalty | None = "wgan-gp", weight: float | None = None, target: float = 1.0, context: Contexts = None,
    fake_context: Contexts = None, epsilon: Tensor | None = None, points: Tensor | None = None,
    generator: torch.Generator | None = None, method: str = "auto", sigma: float = 0.01, batching: str = "auto",
    kind: str | None = None, output: Output = None, patches: str | None = None,
) -> CriticLoss:  # fmt: skip
    """A critic's whole loss, adversarial and penalty together, for one pass over real, fake and interpolated samples.

    A weight's gradient is one product for loss and penalty on the same samples, and R1 costs about one forward pass more than
    the loss alone.

    Args:
        critic, real, fake, weight, target, epsilon, points, generator, method, sigma, output: as in :func:`gradient_penalty`.
        loss: a key of ``genfast.losses.CRITIC_LOSSES`` ("wasserstein", "hinge", "minimax", "lsgan", "relativistic", ...), or a
            function of (real_logits, fake_logits), each (N,), that returns a scalar to be minimised by the critic.
        penalty: a kind of :func:`gradient_penalty`, or None, or a penalty of your own as there.
        kind: where a penalty of your own takes the gradient, "wgan-gp" by default.
        batching: "apart": real, fake and interpolated samples are batches of their own. "together": they go through the critic
            as one batch. "auto" joins them on a GPU, and on a CPU those without a penalty, which takes less memory and time; it
            joins none in a critic that draws random numbers or changes its buffers, so that each batch meets what it meets in
            plain code. Batches are joined only where the record of a pass shows nothing that mixes samples, and only
            after the outputs of one joined batch have equalled those of separate ones, for each structure of the record and
            each batch size; else "together" warns, and they go apart.
        patches: as in :func:`gradient_penalty` for the penalty. The loss then takes all outputs, (N, ...): the ones of this
            library are means over samples and patches.
        context, fake_context: given to the critic after real (and interpolated) and after fake samples.

    Returns:
        CriticLoss; call ``.loss.backward()``.

    What the critic does once per forward (a power iteration, dropout masks) it does once a batch: in the order points of the
    penalty drawn, real, fake, penalty. With "apart", and for such critics with "auto", that is what plain code does which draws
    the points first and calls the critic on these three; on the samples of "r1", "r2" and "r1r2" loss and penalty share one
    pass, and so one mask. Over several processes see
    :func:`gradient_penalty`; "relativistic-average" compares with means over this rank's logits.

    Raises:
        TypeError, ValueError, FloatingPointError: as in :func:`gradient_penalty`.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> step = genfast.ops.critic_step(critic, torch.randn(32, 2), torch.randn(32, 2), loss="hinge", penalty="r1")
        >>> step.loss.backward()
    """
    call = _Call("critic_step", output, patches)
    op = call.op
    function = None if penalty is None or isinstance(penalty, str) else penalty
    if function is None and kind is not None:
        raise ValueError(f"{op}: kind={kind!r} is where a penalty of your own takes the gradient, and penalty={penalty!r}")
    kind = penalty if penalty is None or isinstance(penalty, str) else kind or "wgan-gp"
    _check_inputs(call, critic, real, fake, kind, method, function, sigma)
    if fake is None:
        raise ValueError(f"{op}: fake is None, expected the generator's samples")
    _check.choice(op, "batching", batching, BATCHING)
    if isinstance(loss, str):
        _check.choice(op, "loss", loss, CRITIC_LOSSES)
        loss = CRITIC_LOSSES[loss]
        if loss is CRITIC_LOSSES["relativistic"] and len(fake) != len(real):  # one of them would be broadcast
            raise ValueError(
                f"{op}: fake has {len(fake)} samples and real {len(real)}, and loss='relativistic' compares them one by one, "
                "expected equal numbers"
            )
    elif not callable(loss):
        raise TypeError(f"{op}: loss is a {type(loss).__name__}, expected a name or a function of (real_logits, fake_logits)")
    first = _context(op, "context", context)
    contexts = (first, first if fake_context is None else _context(op, "fake_context", fake_context))
    s = None if kind is None else _Settings(kind, *_numbers(op, weight, target, function), method, float(sigma), function)
    drawn: tuple[Tensor, ...] = ()
    if kind in RANDOM or points is not None:
        drawn = (_random_points(op, real, fake, str(kind), generator, epsilon, points, sigma),)
    compiling = torch.compiler.is_compiling()
    if compiling and _traceable(critic) and patches is None:
        return _compiled(call, critic, [real, fake, *drawn], contexts, _number(loss), s, batching)

    def run(module: Critic, real: Tensor, fake: Tensor, *moved: Tensor) -> CriticLoss:
        at, rest = (moved[0], moved[1:]) if drawn else (None, moved)
        return _step(call, module, real, fake, at, (rest[: len(first)], rest[len(first) :]), loss, s, batching)

    whole = _whole
    if compiling:
        whole = _whole_uncompiled if not _traceable(critic) else _patches_uncompiled
    result: CriticLoss = whole(op, critic, run, real, fake, *drawn, *contexts[0], *contexts[1])
    return result
