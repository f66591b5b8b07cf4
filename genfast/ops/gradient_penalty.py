"""ops.gradient_penalty and ops.critic_step: the penalty on a critic's input gradient without double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference


class CriticStep(NamedTuple):
    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    real_logits: Tensor
    fake_logits: Tensor


def gradient_penalty(
    critic: Callable[..., Tensor], real: Tensor, fake: Tensor | None = None, *, kind: str = "wgan-gp",
    weight: float = 10.0, target: float = 1.0, context: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None, method: str = "auto", return_norms: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    context = () if context is None else (context,) if isinstance(context, Tensor) else tuple(context)
    at = real
    if kind in ("wgan-gp", "wgan-lp"):
        eps = torch.rand((real.shape[0],) + (1,) * (real.dim() - 1), generator=generator)
        at = eps * real + (1 - eps) * fake
    elif kind == "r2":
        at = fake
    value, norms = reference.gradient_penalty(critic, at.detach(), kind, weight, target, context)
    return (value, norms.detach()) if return_norms else value


def critic_step(
    critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *, loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein",
    penalty: str | None = "wgan-gp", weight: float = 10.0, target: float = 1.0,
    context: Tensor | Sequence[Tensor] | None = None, fake_context: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None, method: str = "auto",
) -> CriticStep:  # fmt: skip
    rc = () if context is None else (context,) if isinstance(context, Tensor) else tuple(context)
    fc = rc if fake_context is None else (fake_context,) if isinstance(fake_context, Tensor) else tuple(fake_context)
    r, f = critic(real, *rc).flatten(), critic(fake, *fc).flatten()
    value = reference.CRITIC_LOSSES[loss](r, f) if isinstance(loss, str) else loss(r, f)
    p = r.new_zeros(())
    if penalty is not None:
        p = gradient_penalty(
            critic, real, fake, kind=penalty, weight=weight, target=target, context=rc, generator=generator, method=method
        )
    return CriticStep(value + p, value, p, r, f)
