"""What every adversarial model has: a generator, a critic, and the recipe that its paper trains them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.spectral_norm import spectral_norm
from ..reference.adversarial import CRITIC_LOSSES
from ..reference.modes import evaluating

__all__ = ["AdversarialModel", "Recipe", "leaky_relu", "mlp", "spectral_norm", "stages"]


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


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Linear layers of these sizes with an ``activation()`` between them."""
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for taken, given in zip(sizes[1:-1], sizes[2:]):
        layers += [activation(), nn.Linear(taken, given)]
    return layers


def leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


def stages(name: str, shape: Sequence[int], base: int) -> int:
    """How often ``base`` x ``base`` is doubled up to the side of images of ``shape``; an error where it cannot be."""
    if len(shape) != 3 or shape[1] != shape[2] or base < 1:
        raise ValueError(f"{name}: shape={tuple(shape)} and base={base}, expected square images (C, side, side) and base >= 1")
    number = int(math.log2(max(shape[1] / base, 1)))
    if number < 1 or base << number != shape[1]:
        raise ValueError(f"{name}: shape={tuple(shape)}, expected a side of {base} (base) times 2, 4, 8, ...")
    return number


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
