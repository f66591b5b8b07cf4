"""One op for torch.compile, ``genfast::critic_step``: its forward finds the gradients and its backward scales them."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module  # type: ignore[attr-defined]

from .._compiler import constant
from .._registry import LIBRARY
from .._torch_private import autograd_works
from ..reference.adversarial import CRITIC_LOSSES
from .batch_penalty import penalty_at_points
from .eager_step import eager_step
from .processes import check_sharded
from .settings import NO_PENALTY, Call, Critic, CriticLoss, Settings

_NUMBERS = itertools.count()
_REGISTERED: dict[int, Any] = {}


@constant
def number_of(thing: Any) -> int:
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
    "critic_step(Tensor[] points, Tensor[] contexts, Tensor[] parameters, Tensor[] buffers, int critic, int loss, int "
    "real_contexts, str kind, float weight, float target, str method, float sigma, int penalty, int output, str "
    "patches, str batching, ScalarType? autocast, bool[] wanted) -> (Tensor loss, Tensor adversarial, Tensor penalty, "
    "Tensor real_logits, Tensor fake_logits, Tensor norms, Tensor[] gradients, Tensor[] buffers)"
)


def _op(
    points: list[Tensor],
    contexts: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    number: int,
    loss: int,
    real_contexts: int,
    kind: str,
    weight: float,
    target: float,
    method: str,
    sigma: float,
    penalty: int,
    output: int,
    patches: str,
    batching: str,
    autocast: torch.dtype | None,
    wanted: list[bool],
) -> Any:
    critic = _REGISTERED[number]()
    call = Call(
        "critic_step" if loss >= 0 else "gradient_penalty",
        _REGISTERED[output]() if output >= 0 else None,
        patches or None,
    )
    function = _REGISTERED[penalty]() if penalty >= 0 else None
    s = Settings(kind, weight, target, method, sigma, function) if kind else None
    check_sharded(call.op, critic)
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
                value, norms = penalty_at_points(call, critic, xs, sets, s)
                none = norms.new_zeros(len(xs[0]))  # not empty: two empty outputs would pass for aliases of each other
                found = CriticLoss(value, value, value, none, none, norms)
            else:
                assert adversarial is not None
                at = xs[2] if len(xs) > 2 else None
                found = eager_step(call, critic, xs[0], xs[1], at, sets, adversarial, s, batching)
        inputs = [*(x for x in copies if x.requires_grad), *leaves]
        grads = dict(zip(map(id, inputs), torch.autograd.grad(found.loss, inputs, allow_unused=True)))
        after = [names[n] for n, _ in critic.named_buffers()]
    gradients = [_own(grads.get(id(x)), x) for x in (*copies, *leaves)]
    dtype = torch.promote_types(points[0].dtype, torch.float32)
    return *(t.detach().to(dtype).clone() for t in found), gradients, [b.detach() for b in after]


def _check_alone(op: str, name: str, value: Any) -> None:
    """Raises where a function of the user's own, of constants here, depends on more, which the compiled op would not
    see."""
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
    points: list[Tensor],
    contexts: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    number: int,
    loss: int,
    real_contexts: int,
    kind: str,
    *_: Any,
) -> Any:
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
        scaled[:points],
        scaled[points : points + contexts],
        scaled[points + contexts :],
        [None] * buffers,
        *[None] * 14,
    )


LIBRARY.impl("critic_step", _op, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::critic_step", _op_fake, lib=LIBRARY)
torch.library.register_autograd("genfast::critic_step", _op_backward, setup_context=_op_setup, lib=LIBRARY)


def compiled_step(
    call: Call,
    critic: Critic,
    points: list[Tensor],
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: int,
    s: Settings | None,
    batching: str = "auto",
) -> CriticLoss:
    op = call.op
    if not isinstance(critic, nn.Module):
        raise TypeError(f"{op}: critic is a {type(critic).__name__}; under torch.compile it must be a torch.nn.Module")
    device = points[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    s = s or NO_PENALTY
    parameters, buffers = [p for p in critic.parameters() if p.requires_grad], list(critic.buffers())
    flat = [*contexts[0], *contexts[1]]
    *found, _, after = torch.ops.genfast.critic_step(
        points,
        flat,
        parameters,
        buffers,
        number_of(critic),
        loss,
        len(contexts[0]),
        s.kind,
        s.weight,
        s.target,
        s.method,
        s.sigma,
        -1 if s.function is None else number_of(s.function),
        -1 if call.output is None else number_of(call.output),
        call.patches or "",
        batching,
        autocast,
        [x.requires_grad for x in (*points, *flat)],
    )
    with torch.no_grad():
        for b, new in zip(buffers, after):
            b.copy_(new)
    return CriticLoss(found[0], *(x.detach() for x in found[1:]))
