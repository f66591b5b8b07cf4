"""What every adversarial model has: a generator, a critic, and the recipe that its paper trains them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import evaluating
from ..reference.adversarial import CRITIC_LOSSES
from .blocks import dcgan_networks, mlp_networks


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; every field can be replaced by the user.

    loss: a key of ``genfast.losses.CRITIC_LOSSES``.
    penalty: None, a kind that ``ops.gradient_penalty`` takes, or several ("r1", "r2"); ``weight`` and ``target`` are theirs.
    critic_steps: updates of the critic for one of the generator.
    clip: bound of the critic's weights, None for none.
    optimizer: "adam" with ``betas``, or "rmsprop".
    lazy: the penalty is taken every so many updates of the critic, that many times as strong (arXiv:1912.04958, section 3.2).
    ema: decay of the generator's moving average, which is what samples come from; 0 for none.
    """

    loss: str = "nonsaturating"
    penalty: str | tuple[str, ...] | None = None
    weight: float = 10.0
    target: float = 1.0
    critic_steps: int = 1
    clip: float | None = None
    optimizer: str = "adam"
    generator_lr: float = 2e-4
    critic_lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    lazy: int = 1
    ema: float = 0.999

    def __post_init__(self) -> None:
        if self.loss not in CRITIC_LOSSES:
            raise ValueError(f"Recipe: loss={self.loss!r}, expected one of {', '.join(map(repr, CRITIC_LOSSES))}")
        if self.optimizer not in ("adam", "rmsprop"):
            raise ValueError(f"Recipe: optimizer={self.optimizer!r}, expected 'adam' or 'rmsprop'")
        for name in ("critic_steps", "lazy"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe: {name}={getattr(self, name)}, expected at least 1")
        for name in ("generator_lr", "critic_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Recipe: {name}={value}, expected a positive number")
        if not 0 <= self.ema < 1:
            raise ValueError(f"Recipe: ema={self.ema}, expected at least 0 and less than 1")

    @property
    def penalties(self) -> tuple[str, ...]:
        """The kinds of penalty, one by one."""
        return () if self.penalty is None else (self.penalty,) if isinstance(self.penalty, str) else tuple(self.penalty)


class AdversarialModel(nn.Module):
    """A generator of data from Gaussian latents, and its critic. ``config`` rebuilds the model.

    Images have values in [-1, 1]; points, shape (D,), any. ``generator(z)`` takes (N, latent_dim) and gives (N, *shape);
    ``critic(x)`` gives one logit per sample, (N,). A model with ``classes`` takes labels, int64 (N,), as a second argument
    of both. ``recipe`` says how its paper trains it; :class:`genfast.training.AdversarialTrainer` does so.
    """

    recipe: Recipe = Recipe()
    generator: nn.Module
    critic: nn.Module
    config: dict[str, Any]

    def __init__(self, shape: Sequence[int], latent_dim: int, classes: int | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        self.shape, self.latent_dim, self.classes = tuple(shape), latent_dim, classes
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"{name}: shape={self.shape}, expected (D,) for points or (C, H, W) for images")
        if latent_dim < 1:
            raise ValueError(f"{name}: latent_dim={latent_dim}, expected at least 1")
        if classes is not None and classes < 1:
            raise ValueError(f"{name}: classes={classes}, expected at least 1")

    def latent(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` latents (n, latent_dim) from N(0, 1), on the model's device whatever that of ``generator``."""
        like = next(self.parameters())
        where = like.device if generator is None else generator.device
        return torch.randn(n, self.latent_dim, generator=generator, device=where, dtype=like.dtype).to(like.device)

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None, context: Tensor | None = None, rows: slice | None = None
    ) -> Tensor:
        """Draws ``n`` samples (n, *shape) in evaluation mode.

        Args:
            generator: of the latents.
            context: labels, int64 (n,), of a model with classes; 0, 1, ... in turn without.
            rows: only these of the n, from the latents of all: what one of several processes draws.

        Raises:
            ValueError: labels for a model without classes, or others than expected.
        """
        name = type(self).__name__
        if n < 0:
            raise ValueError(f"{name}.sample: n={n}, expected at least 0")
        z = self.latent(n, generator)
        given: tuple[Tensor, ...] = ()
        if self.classes is not None:
            labels = torch.arange(n, device=z.device) % self.classes if context is None else context.to(z.device)
            if labels.dtype != torch.int64 or labels.shape != (n,):
                raise ValueError(
                    f"{name}.sample: context has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected int64 ({n},)"
                )
            if n and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise ValueError(f"{name}.sample: context has labels outside [0, {self.classes})")
            given = (labels,)
        elif context is not None:
            raise ValueError(f"{name}.sample: context was given, and this model has no classes")
        with evaluating(self.generator):
            drawn: Tensor = self.generator(*(t if rows is None else t[rows] for t in (z, *given)))
        return drawn


class PointsOrImages(AdversarialModel):
    """Perceptrons for points, the DCGAN networks for images: the models that differ from those in their game alone."""

    def __init__(
        self, shape: Sequence[int], *, latent_dim: int | None = None, hidden: int = 256, depth: int = 3, width: int = 64,
        base: int = 4, kernel_size: int = 4,
    ) -> None:  # fmt: skip
        points = len(shape) == 1
        super().__init__(shape, (2 if points else 100) if latent_dim is None else latent_dim)
        self.config = {
            "shape": self.shape, "latent_dim": self.latent_dim, "hidden": hidden, "depth": depth, "width": width,
            "base": base, "kernel_size": kernel_size,
        }  # fmt: skip
        if points:
            self.generator, self.critic = mlp_networks(self.shape, self.latent_dim, hidden, depth)
        else:
            self.generator, self.critic = dcgan_networks(
                type(self).__name__, self.shape, self.latent_dim, width, base, kernel_size
            )
