"""GradientPenalty and CriticStep: the settings of a penalty or of a critic's whole loss, kept in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import _check
from ..ops.gradient_penalty import METHODS, Contexts, CriticLoss
from ..reference.adversarial import CRITIC_LOSSES
from ..reference.gradient_penalty import KINDS


class _Lazy(nn.Module):
    """Counts its calls, and says on which of them the penalty is due."""

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"{type(self).__name__}: every={every}, expected at least 1")
        self.every, self.calls = every, 0

    def _due(self) -> bool:
        self.calls += 1
        return (self.calls - 1) % self.every == 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class GradientPenalty(_Lazy):
    """:func:`genfast.ops.gradient_penalty` with its settings.

    Args:
        kind, weight, target, method: as there.
        every: lazy regularisation (StyleGAN2, arXiv:1912.04958, appendix B): the penalty is computed on the first call and
            every ``every``-th one after it, ``every`` times as heavy, and is zero on the others. Adam then wants lr c and
            betas^c with c = every / (every + 1), as ``genfast.adversarial_training`` sets it.

    Its state_dict keeps the number of calls. Raises TypeError, ValueError as the op does.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 1))
        >>> penalty = genfast.nn.GradientPenalty("r1", weight=1.0, every=16)
        >>> penalty(critic, torch.randn(32, 2)).backward()
    """

    def __init__(
        self, kind: str = "wgan-gp", *, weight: float = 10.0, target: float = 1.0, every: int = 1, method: str = "auto"
    ) -> None:
        super().__init__(every)
        _check.choice("GradientPenalty", "kind", kind, KINDS)
        _check.choice("GradientPenalty", "method", method, METHODS)
        self.kind, self.weight, self.target, self.method = kind, weight, target, method

    def forward(
        self, critic: Callable[..., Tensor], real: Tensor, fake: Tensor | None = None, *, context: Contexts = None,
        fake_context: Contexts = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        if not self._due():
            return real.new_zeros((), dtype=torch.promote_types(real.dtype, torch.float32))
        found: Tensor = ops.gradient_penalty(
            critic, real, fake, kind=self.kind, weight=self.weight * self.every, target=self.target, context=context,
            fake_context=fake_context, generator=generator, method=self.method,
        )  # fmt: skip
        return found

    def extra_repr(self) -> str:
        return f"{self.kind!r}, weight={self.weight}, target={self.target}, every={self.every}"


class CriticStep(_Lazy):
    """:func:`genfast.ops.critic_step` with its settings; ``every`` as in :class:`GradientPenalty`.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 1))
        >>> step = genfast.nn.CriticStep(loss="relativistic", penalty="r1r2", weight=1.0)
        >>> step(critic, torch.randn(32, 2), torch.randn(32, 2)).loss.backward()
    """

    def __init__(
        self, loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein", penalty: str | None = "wgan-gp", *,
        weight: float = 10.0, target: float = 1.0, every: int = 1, method: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(every)
        if isinstance(loss, str):
            _check.choice("CriticStep", "loss", loss, CRITIC_LOSSES)
        if penalty is not None:
            _check.choice("CriticStep", "penalty", penalty, KINDS)
        _check.choice("CriticStep", "method", method, METHODS)
        self.loss, self.penalty, self.weight, self.target, self.method = loss, penalty, weight, target, method

    def forward(self, critic: Callable[..., Tensor], real: Tensor, fake: Tensor, **options: Any) -> CriticLoss:
        """Options: context, fake_context, epsilon, points, generator, as in the op."""
        penalty = self.penalty if self._due() else None
        return ops.critic_step(
            critic, real, fake, loss=self.loss, penalty=penalty, weight=self.weight * self.every, target=self.target,
            method=self.method, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, penalty={self.penalty!r}, weight={self.weight}, target={self.target}, every={self.every}"
