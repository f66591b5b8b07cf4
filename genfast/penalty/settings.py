"""What a call asks for: how the penalty is made of the gradient, and how outputs are taken from what the critic
returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .critic import per_sample_outputs

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


class Settings(NamedTuple):
    """How the penalty is made of the gradient; ``function`` is one of the user's own."""

    kind: str
    weight: float
    target: float
    method: str
    sigma: float
    function: Penalty | None = None


NO_PENALTY = Settings("", 0.0, 0.0, "auto", 0.0)


class Call(NamedTuple):
    """The op that was called, and how it takes the critic's outputs out of what the critic returns."""

    op: str
    output: Output = None
    patches: str | None = None

    def read(self, result: Any, n: int) -> Tensor:
        """The outputs, (n, ...)."""
        if self.output is not None:
            result = self._select(result)
        if self.patches == "sum" and isinstance(result, (tuple, list)) and result:
            parts = [per_sample_outputs(self.op, part, n, True) for part in result]
            return torch.cat([part.reshape(n, -1) for part in parts], 1)
        return per_sample_outputs(self.op, result, n, self.patches is not None)

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
                    raise ValueError(
                        f"{self.op}: output={output!r}, and critic returned the keys {sorted(map(str, result))}"
                    )
                return result[output]
            if isinstance(result, Tensor) or not hasattr(result, output):
                raise TypeError(
                    f"{self.op}: output={output!r} is a key, and critic returned a {what}, expected a mapping or what "
                    "has that attribute"
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
