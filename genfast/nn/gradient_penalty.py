"""GradientPenalty and CriticStep: the settings of a penalty or of a critic's whole loss, kept in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import _check
from ..penalty.settings import BATCHING, METHODS, PATCHES, Contexts, CriticLoss, Output, Penalty
from ..reference.adversarial import CRITIC_LOSSES
from ..reference.gradient_penalty import KINDS


def _settings(name: str, penalty: Any, patches: str | None) -> None:
    if penalty is not None and not callable(penalty):
        raise TypeError(f"{name}: penalty is a {type(penalty).__name__}, expected a function of the gradient (N, ...)")
    if patches is not None:
        _check.choice(name, "patches", patches, PATCHES)


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
        kind, weight, target, method, penalty, output, patches: as there.
        every: lazy regularisation (StyleGAN2, arXiv:1912.04958, appendix B): the penalty is computed on the first call
            and every ``every``-th one after it, ``every`` times as heavy, and is zero on the others. Adam then wants lr
            c and betas^c with c = every / (every + 1), as ``genfast.training`` sets it.

    Its state_dict keeps the number of calls. Raises TypeError, ValueError as the op does.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 1))
        >>> penalty = genfast.nn.GradientPenalty("r1", weight=1.0, every=16)
        >>> penalty(critic, torch.randn(32, 2)).backward()
    """

    def __init__(
        self,
        kind: str = "wgan-gp",
        *,
        weight: float | None = None,
        target: float = 1.0,
        every: int = 1,
        method: str = "auto",
        penalty: Penalty | None = None,
        output: Output = None,
        patches: str | None = None,
    ) -> None:
        super().__init__(every)
        _check.choice("GradientPenalty", "kind", kind, KINDS)
        _check.choice("GradientPenalty", "method", method, METHODS)
        _settings("GradientPenalty", penalty, patches)
        self.kind, self.target, self.method = kind, target, method
        self.weight = (10.0 if penalty is None else 1.0) if weight is None else weight
        self.penalty, self.output, self.patches = penalty, output, patches

    def forward(
        self,
        critic: Callable[..., Any],
        real: Tensor,
        fake: Tensor | None = None,
        *,
        context: Contexts = None,
        fake_context: Contexts = None,
        generator: torch.Generator | None = None,
        epsilon: Tensor | None = None,
        points: Tensor | None = None,
    ) -> Tensor:
        if not self._due():
            return real.new_zeros((), dtype=torch.promote_types(real.dtype, torch.float32))
        found: Tensor = ops.gradient_penalty(
            critic,
            real,
            fake,
            kind=self.kind,
            weight=self.weight * self.every,
            target=self.target,
            context=context,
            fake_context=fake_context,
            generator=generator,
            method=self.method,
            epsilon=epsilon,
            points=points,
            penalty=self.penalty,
            output=self.output,
            patches=self.patches,
        )
        return found

    def extra_repr(self) -> str:
        return f"{self.kind!r}, weight={self.weight}, target={self.target}, every={self.every}"


class CriticStep(_Lazy):
    """:func:`genfast.ops.critic_step` with its settings; ``every`` as in :class:`GradientPenalty`.

    On calls without a penalty, points or random numbers for one are left alone.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.LeakyReLU(0.2), torch.nn.Linear(64, 1))
        >>> step = genfast.nn.CriticStep(loss="relativistic", penalty="r1r2", weight=1.0)
        >>> step(critic, torch.randn(32, 2), torch.randn(32, 2)).loss.backward()
    """

    def __init__(
        self,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "wasserstein",
        penalty: str | Penalty | None = "wgan-gp",
        *,
        weight: float | None = None,
        target: float = 1.0,
        every: int = 1,
        method: str = "auto",
        kind: str | None = None,
        output: Output = None,
        patches: str | None = None,
        batching: str = "auto",
    ) -> None:
        super().__init__(every)
        if isinstance(loss, str):
            _check.choice("CriticStep", "loss", loss, CRITIC_LOSSES)
        own = not (penalty is None or isinstance(penalty, str))
        if isinstance(penalty, str):
            _check.choice("CriticStep", "penalty", penalty, KINDS)
        if kind is not None:
            _check.choice("CriticStep", "kind", kind, KINDS)
            if not own:
                raise ValueError(f"CriticStep: kind={kind!r} goes with a penalty of your own, and penalty={penalty!r}")
        _settings("CriticStep", penalty if own else None, patches)
        _check.choice("CriticStep", "batching", batching, BATCHING)
        _check.choice("CriticStep", "method", method, METHODS)
        self.loss, self.penalty, self.target, self.method = loss, penalty, target, method
        self.weight = (1.0 if own else 10.0) if weight is None else weight
        self.kind, self.output, self.patches, self.batching = kind, output, patches, batching

    def forward(self, critic: Callable[..., Any], real: Tensor, fake: Tensor, **options: Any) -> CriticLoss:
        """Options: context, fake_context, epsilon, points, generator, sigma, as in the op."""
        penalty, kind = (self.penalty, self.kind) if self._due() else (None, None)
        if penalty is None:
            options = {k: v for k, v in options.items() if k not in ("epsilon", "points", "generator")}
        options = {"batching": self.batching} | options
        return ops.critic_step(
            critic,
            real,
            fake,
            loss=self.loss,
            penalty=penalty,
            weight=self.weight * self.every,
            target=self.target,
            method=self.method,
            kind=kind,
            output=self.output,
            patches=self.patches,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"loss={self.loss!r}, penalty={self.penalty!r}, weight={self.weight}, target={self.target}, "
            f"every={self.every}"
        )
