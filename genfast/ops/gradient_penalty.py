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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module  # type: ignore[attr-defined]

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
RANDOM = ("wgan-gp", "wgan-lp", "dragan", "ar1")  # whose points are drawn


class CriticLoss(NamedTuple):
    """What :func:`critic_step` found. Only ``loss`` carries a gradient.

    loss: adversarial + penalty, ().
    adversarial, penalty: its parts, ().
    real_logits, fake_logits: (N,).
    norms: of the critic's gradient at each of the penalty's points, (N,), or (2 N,) for "r1r2"; empty without one.
    """

    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    norms: Tensor


class _Settings(NamedTuple):
    """How the penalty is made of the gradient."""

    kind: str
    weight: float
    target: float
    method: str
    sigma: float


_NO_PENALTY = _Settings("", 0.0, 0.0, "auto", 0.0)


# ---- from gradients to the penalty ----


def _penalty(g: Tensor | None, n: int, like: Tensor, s: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(value, norms (n,), dP/dg) from g = d(sum of outputs)/dx of n samples."""
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


def _finite_difference(op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    """The exact value, and gradients from the critic at two points beside x: three ordinary passes forward and back.

    d<u, grad S>/dtheta = d(S(x + e u) - S(x - e u))/dtheta / 2 e + O(e^2), with buffers and random numbers as in the first.
    """
    with tangent.restored(critic) as restore:
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            d = tangent.per_sample_outputs(op, critic(at, *context), len(x)).sum()
        (g,) = torch.autograd.grad(d, at, allow_unused=True)
        after = [b.clone() for b in critic.buffers()] if isinstance(critic, nn.Module) else []
        value, norms, u = _penalty(g, len(x), x, s)
        if u is None or not torch.is_grad_enabled():
            return value, norms
        step = torch.finfo(x.dtype).eps ** (1 / 3)
        e = step * x.detach().abs().max().clamp(min=1) / u.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        ends = []
        for sign in (1, -1):
            restore()
            ends.append(critic(x + sign * e * u, *context).sum())
        if isinstance(critic, nn.Module):
            with torch.no_grad():
                for b, last in zip(critic.buffers(), after):
                    b.copy_(last)
        slope = (ends[0] - ends[1]).to(value.dtype) / (2 * e.to(value.dtype))
        return value + (slope - slope.detach()), norms


def _double_backward(op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    original = tangent.unwrapped(critic)

    def checked(at: Tensor, *rest: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return tangent.per_sample_outputs(op, original(at, *rest), len(x))

    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        value, norms = reference.gradient_penalty(checked, x, s.kind, s.weight, s.target, context)
    return value, norms.detach()


def _fallback(op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    """Double backward by PyTorch; where that is not implemented, finite differences."""
    if s.method != "finite-difference":
        try:
            value, norms = _double_backward(op, critic, x, context, s)
            known = tangent.facts(critic)
            if s.method == "auto" and value.requires_grad and isinstance(critic, nn.Module) and not known.differentiated_twice:
                # a missing second derivative shows only now
                parameters = [p for p in critic.parameters() if p.requires_grad][:1]
                torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                known.differentiated_twice = True
            return value, norms
        except (NotImplementedError, RuntimeError) as error:
            missing = any(
                m in str(error)
                for m in ("not implemented", "double backward", "higher order", "once_differentiable", "no autograd formula")
            )
            if s.method == "autograd" or not missing:
                raise
            warnings.warn(f"{op}: PyTorch has no double backward here ({error}); finite differences are used", stacklevel=4)
    return _finite_difference(op, critic, x, context, s)


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


def _failure(error: Exception, s: _Settings) -> Exception:
    """An exception of the exact form, after which the plain way is tried: what that raises is the caller's own error."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):  # the plain way takes more
        raise error
    return error if s.method == "exact" else error.with_traceback(None)  # whose frames hold the record


def _exact(op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings, start: Any) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x by the rules."""
    recorded = tangent.Pass(op, critic, x, context, loss=False, start=start)
    value, norms, u = _penalty(recorded.input_gradient(len(x)), len(x), x, s)
    if not torch.is_grad_enabled():
        return value, norms
    _warn_coupled(op, critic)
    to_x = recorded.sweep(u, to_x=x.requires_grad)
    found = recorded.gradients()
    if x.requires_grad:
        found.append((x, to_x))
    return tangent.attach(value, found, critic), norms


def _run_penalty(op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], s: _Settings) -> tuple[Tensor, Tensor]:
    """(value with its gradients, norms) at x."""
    known = tangent.facts(critic)
    failed: Exception | None = None
    if s.method in ("auto", "exact") and (known.unsupported is None or s.method == "exact"):
        with tangent.restored(critic) as start:
            try:
                return _exact(op, critic, x, context, s, start)
            except Exception as error:
                failed = _failure(error, s)
                start()
    value, norms = _fallback(op, critic, x, context, s)
    if failed is not None:
        _unsupported(op, critic, failed, s)
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


# ---- the steps, eager ----


def _ar1(
    op: str, critic: Critic, points: Sequence[Tensor], context: Sequence[Tensor], s: _Settings
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d, near = (tangent.per_sample_outputs(op, critic(p, *context), len(p)).reshape(-1) for p in points)
    difference = (d - near).to(torch.promote_types(d.dtype, torch.float32))
    return s.weight * difference.square().mean(), (difference.detach().abs() / s.sigma)


def _penalty_only(
    op: str, critic: Critic, points: Sequence[Tensor], contexts: Sequence[Sequence[Tensor]], s: _Settings
) -> tuple[Tensor, Tensor]:
    """The sum over batches of points (one, or real and fake for "r1r2"; for "ar1" real and what is near it)."""
    if s.kind == "ar1":
        return _ar1(op, critic, points, contexts[0], s)
    values, norms = [], []
    for x, context in zip(points, contexts):
        value, norm = _run_penalty(op, critic, x, context, s)
        values.append(value)
        norms.append(norm)
    return sum(values[1:], start=values[0]), torch.cat(norms)


def _slopes(op: str, loss: Callable[[Tensor, Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dreal, dloss/dfake)."""
    r, f = real.detach().requires_grad_(), fake.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(r, f)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"{op}: loss returned {what}, expected a scalar of (real_logits, fake_logits)")
        slopes = torch.autograd.grad(value.sum(), (r, f), materialize_grads=True)
    return value.detach().reshape(()), slopes[0], slopes[1]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        return torch.cat(list(tensors))


def _step(
    op: str, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None, contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None, batching: str,
) -> CriticLoss:  # fmt: skip
    known = tangent.facts(critic)
    failed: Exception | None = None
    exact = (s is None or s.kind != "ar1") and (s is None or s.method in ("auto", "exact"))
    if exact and (known.unsupported is None or (s is not None and s.method == "exact")):
        with tangent.restored(critic) as restore:
            try:
                # On a CPU one batch after another meets warmer caches, and takes less memory.
                together = batching == "together" or (batching == "auto" and not real.is_cpu)
                if together and _stackable(real, fake, contexts) and known.apart is not False:
                    found = _stacked(op, critic, real, fake, at, contexts, loss, s, restore)
                    if found is not None:
                        return found
                    restore()
                return _separate(op, critic, real, fake, at, contexts, loss, s, restore)
            except Exception as error:
                failed = _failure(error, s or _NO_PENALTY)
                restore()
    d_real, d_fake = (tangent.per_sample_outputs(op, critic(x, *c), len(x)).reshape(-1) for x, c in zip((real, fake), contexts))
    wide = [d.to(torch.promote_types(d.dtype, torch.float32)) for d in (d_real, d_fake)]
    adversarial = loss(*wide)
    penalty, norms = adversarial.new_zeros(()), adversarial.new_zeros(0)
    if s is not None:
        points, chosen = _points(real, fake, at, contexts, s.kind)
        penalty, norms = _penalty_only(op, critic, points, chosen, s if failed is None else s._replace(method="autograd"))
        _check_finite(op, penalty, norms)
    if failed is not None:
        _unsupported(op, critic, failed, s or _NO_PENALTY)
    return CriticLoss(
        adversarial + penalty, adversarial.detach(), penalty.detach(), wide[0].detach(), wide[1].detach(), norms.detach()
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


def _stackable(real: Tensor, fake: Tensor, contexts: tuple[Sequence[Tensor], Sequence[Tensor]]) -> bool:
    """Whether real and fake can go through the critic as one batch."""
    n, m = real.shape[0], fake.shape[0]
    return real.dtype == fake.dtype and real.shape[1:] == fake.shape[1:] and len(contexts[0]) == len(contexts[1]) and all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and b.dim() > 0 and a.shape[0] == n
        and b.shape[0] == m and a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
        for a, b in zip(*contexts)
    )  # fmt: skip


def _stacked(
    op: str, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None, contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None, restore: Callable[[], None],
) -> CriticLoss | None:  # fmt: skip
    """All points as one batch, those of the penalty first; None if the critic turns out to couple samples."""
    n, m = real.shape[0], fake.shape[0]
    kind = s.kind if s is not None else ""
    parts = [(real, contexts[0]), (fake, contexts[1])]
    if kind == "r2":
        parts.reverse()
    elif at is not None:
        parts.insert(0, (at, contexts[0]))
    rows = 0 if s is None else n + m if kind == "r1r2" else parts[0][0].shape[0]
    x = _stack([p for p, _ in parts])
    context = [_stack(c) if len(c) > 1 else c[0] for c in zip(*(c for _, c in parts))]
    recorded = tangent.Pass(op, critic, x, context, loss=True, start=restore)
    if not recorded.tape.apart:
        return None
    shared = recorded.tape.per_sample  # else the loss needs a chain of its own
    first = rows if at is not None else 0
    values = recorded.values
    d_real, d_fake = values[first : first + n], values[first + n :]
    if kind == "r2":
        d_fake, d_real = values[:m], values[m:]
    adversarial, *order = _slopes(op, loss, d_real, d_fake)
    wants_x = x.requires_grad
    if kind == "r2":
        order.reverse()
    if at is not None:
        order.insert(0, values.new_zeros(rows))
    slope = torch.cat(order)
    g = recorded.input_gradient(rows, slope if shared else None, all_of_x=wants_x and shared) if rows or shared else None
    penalty, norms, u = adversarial.new_zeros(()), adversarial.new_zeros(0), None
    if s is not None:
        own = None if g is None else g[:rows]
        if kind == "r1r2":  # two means
            halves = [(slice(0, n), n), (slice(n, n + m), m)]
            results = [_penalty(None if own is None else own[part], count, real, s) for part, count in halves]
            penalty, norms = results[0][0] + results[1][0], torch.cat([r[1] for r in results])
            u = None if own is None else torch.cat([r[2] for r in results if r[2] is not None])
        else:
            penalty, norms, u = _penalty(own, rows, real, s)
        _check_finite(op, penalty, norms)
    total = adversarial + penalty
    if torch.is_grad_enabled():
        to_x = recorded.sweep(u, None if shared else slope, to_x=wants_x)
        found = recorded.gradients()
        if wants_x:
            found.append((x, to_x))
        total = tangent.attach(total, found, critic)
    return CriticLoss(total, adversarial, penalty, d_real, d_fake, norms)


def _separate(
    op: str, critic: Critic, real: Tensor, fake: Tensor, at: Tensor | None, contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor], s: _Settings | None, restore: Callable[[], None],
) -> CriticLoss:  # fmt: skip
    """Points with a penalty as a batch of their own, and each kind in a critic that couples samples, one after another."""
    kind = s.kind if s is not None else ""
    penalised = {"r1": [0], "r2": [1], "r1r2": [0, 1]}.get(kind, [] if s is None else [2])
    gradients: dict[int, tuple[Tensor, Tensor, bool]] = {}
    to_inputs: list[tuple[Tensor, Tensor | None]] = []
    penalties, norms = [], []
    wanted = torch.is_grad_enabled()

    def record(x: Tensor, context: Sequence[Tensor], has_loss: bool) -> tangent.Pass:
        return tangent.Pass(op, critic, x, context, loss=has_loss and wanted, into=gradients)

    def finish(x: Tensor, recorded: tangent.Pass, slope: Tensor | None, has_penalty: bool) -> None:
        """The sweeps over one of the passes; its record is dropped."""
        shared = slope is not None and recorded.tape.per_sample
        u: Tensor | None = None
        if has_penalty:
            assert s is not None
            g = recorded.input_gradient(len(x), slope if shared else None, all_of_x=x.requires_grad)
            value, norm, u = _penalty(g, len(x), real, s)
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
    # Without a penalty of their own, real and fake samples are one batch where the critic keeps them apart.
    if not {0, 1} & set(penalised) and _stackable(real, fake, contexts) and tangent.facts(critic).apart is not False:
        x = _stack([real, fake])
        recorded = record(x, [_stack(c) for c in zip(*contexts)], True)
        if recorded.tape.apart:
            values = list(recorded.values.split([len(real), len(fake)]))
            adversarial, *slopes = _slopes(op, loss, *values)
            finish(x, recorded, torch.cat(slopes), False)
        else:
            restore()
    if not values:
        kept: list[tangent.Pass] = []
        for i, (x, c) in enumerate(((real, contexts[0]), (fake, contexts[1]))):
            recorded = record(x, c, True)
            values.append(recorded.values)
            if any(loss is f for f in SEPARABLE):
                finish(x, recorded, _slopes(op, loss, values[i], values[i])[1 + i], i in penalised)
            else:
                kept.append(recorded)
        adversarial, *slopes = _slopes(op, loss, *values)
        if kept:
            for i, (x, slope) in enumerate(zip((real, fake), slopes)):
                finish(x, kept[i], slope, i in penalised)
            kept.clear()
    if at is not None:
        finish(at, record(at, contexts[0], False), None, True)
    penalty = sum(penalties, start=adversarial.new_zeros(()))
    total = adversarial + penalty
    if wanted:
        if penalised:
            _warn_coupled(op, critic)
        found = [(tensor, gradient) for tensor, gradient, _ in gradients.values()]
        total = tangent.attach(total, found + to_inputs, critic)
    return CriticLoss(
        total, adversarial, penalty, values[0], values[1], torch.cat(norms) if norms else adversarial.new_zeros(0)
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
    try:
        _REGISTERED[number] = weakref.ref(thing, lambda _: _REGISTERED.pop(number, None))
    except TypeError:
        _REGISTERED[number] = lambda: thing
    return number


LIBRARY.define(
    "critic_step(Tensor[] points, Tensor[] contexts, Tensor[] parameters, Tensor[] buffers, int critic, int loss, "
    "int real_contexts, str kind, float weight, float target, str method, float sigma, str batching, ScalarType? autocast, "
    "bool[] wanted) -> (Tensor loss, Tensor adversarial, Tensor penalty, Tensor real_logits, Tensor fake_logits, Tensor norms, "
    "Tensor[] gradients, Tensor[] buffers)"
)


def _op(
    points: list[Tensor], contexts: list[Tensor], parameters: list[Tensor], buffers: list[Tensor], number: int, loss: int,
    real_contexts: int, kind: str, weight: float, target: float, method: str, sigma: float, batching: str,
    autocast: torch.dtype | None, wanted: list[bool],
) -> Any:  # fmt: skip
    critic = _REGISTERED[number]()
    s = _Settings(kind, weight, target, method, sigma) if kind else None
    _check_sharded("critic_step" if loss >= 0 else "gradient_penalty", critic)
    with autograd_works(), torch.enable_grad():
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
                value, norms = _penalty_only("gradient_penalty", critic, xs, sets, s)
                none = norms.new_zeros(len(xs[0]))  # not empty: two empty outputs would pass for aliases of each other
                found = CriticLoss(value, value, value, none, none, norms)
            else:
                at = xs[2] if len(xs) > 2 else None
                found = _step("critic_step", critic, xs[0], xs[1], at, sets, _REGISTERED[loss](), s, batching)
        inputs = [*(x for x in copies if x.requires_grad), *leaves]
        grads = dict(zip(map(id, inputs), torch.autograd.grad(found.loss, inputs, allow_unused=True)))
        after = [names[n] for n, _ in critic.named_buffers()]
    gradients = [_own(grads.get(id(x)), x) for x in (*copies, *leaves)]
    dtype = torch.promote_types(points[0].dtype, torch.float32)
    return *(t.detach().to(dtype).clone() for t in found), gradients, [b.detach() for b in after]


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
        *[None] * 11,
    )  # fmt: skip


LIBRARY.impl("critic_step", _op, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::critic_step", _op_fake, lib=LIBRARY)
torch.library.register_autograd("genfast::critic_step", _op_backward, setup_context=_op_setup, lib=LIBRARY)


def _compiled(
    op: str, critic: Critic, points: list[Tensor], contexts: tuple[Sequence[Tensor], Sequence[Tensor]], loss: int,
    s: _Settings | None, batching: str = "auto",
) -> CriticLoss:  # fmt: skip
    if not isinstance(critic, nn.Module):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}; under torch.compile it must be a torch.nn.Module")
    device = points[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    s = s or _NO_PENALTY
    parameters, buffers = [p for p in critic.parameters() if p.requires_grad], list(critic.buffers())
    flat = [*contexts[0], *contexts[1]]
    *found, _, after = torch.ops.genfast.critic_step(
        points, flat, parameters, buffers, _number(critic), loss, len(contexts[0]), s.kind, s.weight, s.target, s.method,
        s.sigma, batching, autocast, [x.requires_grad for x in (*points, *flat)],
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


def _check_inputs(op: str, critic: Any, real: Any, fake: Any, kind: str | None, method: str) -> None:
    if not callable(critic):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}, expected a callable of (x, *context)")
    if kind is not None:
        _check.choice(op, "kind" if op == "gradient_penalty" else "penalty", kind, KINDS)
    _check.choice(op, "method", method, METHODS)
    _check.floating(op, real=real, fake=fake)
    needs = kind in ("wgan-gp", "wgan-lp", "r2", "r1r2")
    if fake is None and needs:
        raise ValueError(f"{op}: fake is None, and kind={kind!r} needs it")
    for name, x in (("real", real), ("fake", fake)):
        if x is not None and (x.dim() < 1 or x.shape[0] == 0):
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (N, ...) with at least one sample")
    if fake is not None and kind in ("wgan-gp", "wgan-lp") and (fake.shape != real.shape or fake.dtype != real.dtype):
        raise ValueError(
            f"{op}: fake has shape {tuple(fake.shape)} and dtype {fake.dtype}, expected those of real: {tuple(real.shape)}, "
            f"{real.dtype} (each sample is interpolated with one of the other)"
        )


def _random_points(
    op: str, real: Tensor, fake: Tensor | None, kind: str, generator: Any, epsilon: Tensor | None, points: Tensor | None,
    sigma: float,
) -> Tensor:  # fmt: skip
    """What :func:`reference.penalty_points` draws, or ``points``."""
    if points is None:
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
    critic: Critic, real: Tensor, fake: Tensor | None = None, *, kind: str = "wgan-gp", weight: float = 10.0,
    target: float = 1.0, context: Contexts = None, fake_context: Contexts = None, epsilon: Tensor | None = None,
    points: Tensor | None = None, generator: torch.Generator | None = None, method: str = "auto", sigma: float = 0.01,
    return_norms: bool = False,
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
        critic: a module, or any callable, of (x, *context) that returns one value per sample: (N,), (N, 1), ...
        real, fake: (N, ...) floating point. Gradients go to those that require them.
        weight: lambda, or gamma for R1 and R2.
        context: a tensor or several, given to the critic after x; for "r2", of fake.
        fake_context: what goes with fake in "r1r2"; ``context`` by default.
        epsilon: (N,), instead of random ones.
        points: (N, ...), those of the penalties that draw some, instead of random ones: eps real + (1 - eps) fake, or
            real + sigma noise for "ar1".
        generator: draws the random numbers.
        method: "exact" by the rules of ``genfast.tangent``, or an error that says what has none; "finite-difference", two more
            passes forward and back, for critics of opaque kernels (error about 1e-4 in float32); "autograd", PyTorch's double
            backward; "auto" takes the first of exact, autograd and finite-difference that works, and warns if that is not the
            first. ``genfast.explain(critic)`` prints the rule of each part.
        sigma: the step of "ar1".
        return_norms: also returns the norms, (N,), without a gradient.

    Returns:
        (), float32 or better, or (penalty, norms). Differentiable once; its gradient is exact where activations are
        differentiable, and takes the subgradients that autograd takes elsewhere. Where ||g|| = 0 it is zero.

    Layers that couple samples (batch norm in training, minibatch deviation) get the gradient of the summed outputs, which is
    what double backward gives too, and a warning. Under torch.autocast products run in bfloat16; under a float16 autocast the
    penalty runs in float32, so that no loss scale is needed inside it: scale the total loss as usual.

    Over several processes give the critic as it is wrapped in DistributedDataParallel: this is one forward pass to it (in
    torch.compile without graph breaks only if it looks for no unused parameters). Or call this in the forward of a module that
    is wrapped, or sharded by fully_shard as a whole. The value is the mean over this rank's samples; ranks with equally many
    then get the gradient of one process on all of them, given the same points. Where samples are coupled they are so within a
    rank: through layers, and in "dragan", whose std is that of this rank's ``real`` (give it ``points`` of the whole batch).

    Raises:
        TypeError, ValueError: arguments that do not fit, critics that return anything but one value per sample, critics that
            are sharded apart from the module that calls this.
        FloatingPointError: norms that are not finite, on this rank; on a GPU, which is not waited for, the value is not finite
            either.
        genfast.tangent.Unsupported: with method="exact".

    Source: Gulrajani et al. 2017 (arXiv:1704.00028, section 4); Etmann 2019 (arXiv:1906.06637) for the work it takes.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> genfast.ops.gradient_penalty(critic, torch.randn(32, 2), torch.randn(32, 2)).backward()
    """
    op = "gradient_penalty"
    _check_inputs(op, critic, real, fake, kind, method)
    s = _Settings(kind, float(weight), float(target), method, float(sigma))
    first = _context(op, "context", context)
    second = first if fake_context is None else _context(op, "fake_context", fake_context)
    if kind == "r1r2" and points is None:
        assert fake is not None
        at, contexts = [real, fake], (first, second)
    else:
        at, contexts = [_random_points(op, real, fake, kind, generator, epsilon, points, sigma)], (first, ())
        if kind == "ar1":
            at.insert(0, real)
    compiling = torch.compiler.is_compiling()
    if compiling and kind != "ar1" and _traceable(critic):
        step = _compiled(op, critic, at, contexts, -1, s)
        value, norms = step.loss, step.norms
    else:
        count = len(at)

        def run(module: Critic, *moved: Tensor) -> tuple[Tensor, Tensor]:
            sets = moved[count : count + len(contexts[0])], moved[count + len(contexts[0]) :]
            value, norms = _penalty_only(op, module, moved[:count], sets, s)
            _check_finite(op, value, norms)
            return value, norms

        whole = _whole_uncompiled if compiling and kind != "ar1" else _whole
        value, norms = whole(op, critic, run, *at, *contexts[0], *contexts[1])
    return (value, norms) if return_norms else value


def critic_step(
    critic: Critic, real: Tensor, fake: Tensor, *, loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein",
    penalty: str | None = "wgan-gp", weight: float = 10.0, target: float = 1.0, context: Contexts = None,
    fake_context: Contexts = None, epsilon: Tensor | None = None, points: Tensor | None = None,
    generator: torch.Generator | None = None, method: str = "auto", sigma: float = 0.01, batching: str = "auto",
) -> CriticLoss:  # fmt: skip
    """A critic's whole loss, adversarial and penalty together, for one pass over real, fake and interpolated samples.

    A weight's gradient is one product for loss and penalty on the same samples, and R1 costs about one forward pass more than
    the loss alone.

    Args:
        critic, real, fake, weight, target, epsilon, points, generator, method, sigma: as in :func:`gradient_penalty`.
        loss: a key of ``genfast.losses.CRITIC_LOSSES`` ("wasserstein", "hinge", "minimax", "lsgan", "relativistic", ...), or a
            function of (real_logits, fake_logits), each (N,), that returns a scalar to be minimised by the critic.
        penalty: a kind of :func:`gradient_penalty`, or None.
        batching: "together": real, fake and interpolated samples go through the critic as one batch, where it keeps samples
            apart; "apart": those with a penalty are a batch of their own, and all three are in a critic that couples samples,
            as batch norm in training needs; "auto": together on a GPU, apart on a CPU, where that takes less memory and time.
        context, fake_context: given to the critic after real (and interpolated) and after fake samples.

    Returns:
        CriticLoss; call ``.loss.backward()``.

    What the critic does once per forward (a power iteration, dropout masks) it does once a batch. Over several processes see
    :func:`gradient_penalty`; "relativistic-average" compares with means over this rank's logits.

    Raises:
        TypeError, ValueError, FloatingPointError: as in :func:`gradient_penalty`.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> step = genfast.ops.critic_step(critic, torch.randn(32, 2), torch.randn(32, 2), loss="hinge", penalty="r1")
        >>> step.loss.backward()
    """
    op = "critic_step"
    _check_inputs(op, critic, real, fake, penalty, method)
    if fake is None:
        raise ValueError(f"{op}: fake is None, expected the generator's samples")
    _check.choice(op, "batching", batching, BATCHING)
    if isinstance(loss, str):
        _check.choice(op, "loss", loss, CRITIC_LOSSES)
        loss = CRITIC_LOSSES[loss]
    first = _context(op, "context", context)
    contexts = (first, first if fake_context is None else _context(op, "fake_context", fake_context))
    s = None if penalty is None else _Settings(penalty, float(weight), float(target), method, float(sigma))
    drawn: tuple[Tensor, ...] = ()
    if penalty in RANDOM or points is not None:
        drawn = (_random_points(op, real, fake, str(penalty), generator, epsilon, points, sigma),)
    compiling = torch.compiler.is_compiling()
    if compiling and _traceable(critic):
        return _compiled(op, critic, [real, fake, *drawn], contexts, _number(loss), s, batching)

    def run(module: Critic, real: Tensor, fake: Tensor, *moved: Tensor) -> CriticLoss:
        at, given = (moved[0], moved[1:]) if drawn else (None, moved)
        return _step(op, module, real, fake, at, (given[: len(first)], given[len(first) :]), loss, s, batching)

    whole = _whole_uncompiled if compiling else _whole
    found: CriticLoss = whole(op, critic, run, real, fake, *drawn, *contexts[0], *contexts[1])
    return found
