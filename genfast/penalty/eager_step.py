"""A critic's loss and penalty in eager mode: the batches one after another, or all as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.adversarial import CRITIC_LOSSES, SEPARABLE
from .batch_penalty import penalty_at_points, warn_coupled
from .critic import Pass, attach
from .fallback import call_critic, failure_of_rules, report_unsupported
from .joined_batches import Part, joined_pass
from .penalty_value import check_finite, graph_ends, penalty_of_gradient
from .settings import NO_PENALTY, Call, Critic, CriticLoss, Settings
from .state import facts, restored


def _check_loss(op: str, value: Any, logits: Tensor) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{op}: loss returned {what}, expected a scalar of (real_logits, fake_logits)")
    if logits.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(f"{op}: loss does not depend on the logits that it was given, expected a function of them")


def loss_slopes(
    op: str, loss: Callable[[Tensor, Tensor], Tensor], real: Tensor, fake: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dreal, dloss/dfake); the loss keeps the graph to what it depends on besides the logits."""
    with torch.inference_mode(False), torch.enable_grad():
        r, f = (x.detach().clone() if x.is_inference() else x.detach() for x in (real, fake))
        value = loss(r.requires_grad_(), f.requires_grad_())
        _check_loss(op, value, r)
        others = (
            any(t is not r and t is not f for t in graph_ends(value)) if loss not in CRITIC_LOSSES.values() else False
        )
        slopes = torch.autograd.grad(value.sum(), (r, f), retain_graph=others, materialize_grads=True)
        value = value.reshape(()) if others else value.detach().reshape(())
    return value, slopes[0], slopes[1]


def eager_step(
    call: Call,
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    s: Settings | None,
    batching: str,
) -> CriticLoss:
    op = call.op
    known = facts(critic)
    failed: Exception | None = None
    exact = (s is None or s.kind != "ar1") and (s is None or s.method in ("auto", "exact"))
    if exact and (known.unsupported is None or (s is not None and s.method == "exact")):
        with restored(critic) as restore:
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
                failed = failure_of_rules(op, critic, error, s or NO_PENALTY)
    d_real, d_fake = (
        call.logits(call.read(call_critic(op, critic, name, x, c), len(x)), len(x))
        for name, x, c in zip(("real", "fake"), (real, fake), contexts)
    )
    adversarial = loss(d_real, d_fake)
    _check_loss(op, adversarial, d_real)
    adversarial = adversarial.reshape(())
    penalty, norms = adversarial.new_zeros(()), adversarial.new_zeros(0)
    if s is not None:
        points, chosen = _points(real, fake, at, contexts, s.kind)
        penalty, norms = penalty_at_points(call, critic, points, chosen, s, plain=failed is not None)
        check_finite(op, penalty, norms)
    if failed is not None:
        report_unsupported(op, critic, failed, s or NO_PENALTY)
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


def _stacked(
    call: Call,
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    s: Settings | None,
    restore: Callable[[], None],
    batching: str,
) -> CriticLoss | None:
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
    recorded = joined_pass(call, critic, parts, restore, batching, None)
    if recorded is None:
        return None
    values = recorded.values
    total_rows = len(values)
    # else the loss needs a chain of its own
    shared = recorded.sweeps.per_sample and (values.dim() == 1 or not rows)
    first = rows if at is not None else 0
    d_real, d_fake = values[first : first + n], values[first + n :]
    if kind == "r2":
        d_fake, d_real = values[:m], values[m:]
    adversarial, *order = loss_slopes(op, loss, d_real, d_fake)
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
            results = [
                penalty_of_gradient(op, None if own is None else own[part], real, count, s) for part, count in halves
            ]
            penalty, norms = results[0][0] + results[1][0], torch.cat([r[1] for r in results])
            u = None if own is None else torch.cat([r[2] for r in results if r[2] is not None])
        else:
            penalty, norms, u = penalty_of_gradient(op, own, real, rows, s)
        check_finite(op, penalty, norms)
    if u is not None and not shared and rows < total_rows:
        u = torch.cat([u, u.new_zeros((total_rows - rows, *u.shape[1:]))])
    total = adversarial + penalty
    if torch.is_grad_enabled():
        to_x = recorded.sweep(u, None if shared else slope, to_x=wants_x)
        collected = recorded.gradients()
        if wants_x:
            collected.append((x, to_x))
        total = attach(total, collected, critic)
    return CriticLoss(total, adversarial.detach(), penalty.detach(), d_real, d_fake, norms)


def _separate(
    call: Call,
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    at: Tensor | None,
    contexts: tuple[Sequence[Tensor], Sequence[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    s: Settings | None,
    restore: Callable[[], None],
    batching: str,
) -> CriticLoss:
    """One batch after another: real, fake, points of the penalty; real and fake as one for "auto", where they may
    be."""
    op = call.op
    kind = s.kind if s is not None else ""
    penalised = {"r1": [0], "r2": [1], "r1r2": [0, 1]}.get(kind, [] if s is None else [2])
    gradients: dict[int, tuple[Tensor, Tensor, bool]] = {}
    to_inputs: list[tuple[Tensor, Tensor | None]] = []
    penalties, norms = [], []
    wanted = torch.is_grad_enabled()

    def record(x: Tensor, context: Sequence[Tensor], has_loss: bool) -> Pass:
        return Pass(
            op,
            critic,
            x,
            context,
            loss=has_loss and wanted,
            into=gradients,
            read=call.read,
            mean=call.patches == "mean",
        )

    def finish(x: Tensor, recorded: Pass, slope: Tensor | None, has_penalty: bool) -> None:
        """The sweeps over one of the passes; its record is dropped."""
        shared = slope is not None and recorded.sweeps.per_sample and (slope.dim() == 1 or not has_penalty)
        u: Tensor | None = None
        if has_penalty:
            assert s is not None
            g = recorded.input_gradient(len(x), slope if shared else None, all_of_x=x.requires_grad)
            value, norm, u = penalty_of_gradient(op, g, x, len(x), s)
            check_finite(op, value, norm)
            penalties.append(value)
            norms.append(norm)
        elif wanted and shared:
            recorded.input_gradient(0, slope, all_of_x=x.requires_grad)
        if wanted:
            to_x = recorded.sweep(u, None if shared else slope, to_x=x.requires_grad)
            if x.requires_grad:
                to_inputs.append((x, to_x))
        del recorded.sweeps

    values: list[Tensor] = []
    # Without a penalty of their own, real and fake samples may be one batch.
    if batching == "auto" and not {0, 1} & set(penalised):
        both = joined_pass(
            call, critic, [(real, contexts[0]), (fake, contexts[1])], restore, batching, gradients, loss=wanted
        )
        if both is not None:
            values = list(both.values.split([len(real), len(fake)]))
            adversarial, *slopes = loss_slopes(op, loss, *values)
            finish(both.x, both, torch.cat(slopes), False)
            del both
    if not values:
        waiting: list[Pass] = []
        for i, (x, c) in enumerate(((real, contexts[0]), (fake, contexts[1]))):
            recorded = record(x, c, True)
            values.append(recorded.values)
            if any(loss is f for f in SEPARABLE):
                finish(x, recorded, loss_slopes(op, loss, values[i], values[i])[1 + i], i in penalised)
            else:
                waiting.append(recorded)
        adversarial, *slopes = loss_slopes(op, loss, *values)
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
            warn_coupled(op, critic)
        collected = [(tensor, gradient) for tensor, gradient, _ in gradients.values()]
        total = attach(total, collected + to_inputs, critic)
    return CriticLoss(
        total,
        adversarial.detach(),
        penalty.detach(),
        values[0],
        values[1],
        torch.cat(norms) if norms else adversarial.new_zeros(0),
    )
