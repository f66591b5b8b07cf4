"""What every adversarial model has: a generator, a critic, and the recipe that its paper trains them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import losses, ops, reference
from .._modes import evaluating
from ..reference.adversarial import CRITIC_LOSSES, RELATIVISTIC
from .blocks import dcgan_networks, mlp_networks
from .phases import Losses

Game = Literal["minimax", "nonsaturating", "hinge", "lsgan", "wasserstein"]
CriticLoss = Literal[Game, "relativistic", "relativistic-average"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; every field can be replaced by the user.

    Args:
        loss: the game, a key of ``genfast.losses.CRITIC_LOSSES``.
        penalty: "wgan-gp", "wgan-lp", "r1", "r2", "dragan" or another kind of ``ops.gradient_penalty``, several (on the
            command line with commas), or None.
        weight: of the penalty.
        target: of the gradient's norm, which the penalty draws it to.
        critic_steps: updates of the critic for one of the generator.
        clip: bound of the critic's weights, None for none.
        optimizer: "adam" with ``betas``, or "rmsprop".
        generator_lr: the generator's learning rate.
        critic_lr: the critic's learning rate.
        betas: of Adam.
        lazy: the penalty is taken every so many updates of the critic, that many times as strong (arXiv:1912.04958,
            section 3.2).
        ema: decay of the generator's moving average, which is what samples come from; 0 for none.
    """

    loss: CriticLoss = "nonsaturating"
    penalty: str | tuple[str, ...] | None = None
    weight: float = 10.0
    target: float = 1.0
    critic_steps: int = 1
    clip: float | None = None
    optimizer: Literal["adam", "rmsprop"] = "adam"
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


@contextmanager
def _without_gradient(module: nn.Module) -> Iterator[None]:
    """While entered, what is computed has no gradient in the module's parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class AdversarialModel(nn.Module):
    """A generator of data from Gaussian latents, and its critic. ``config`` rebuilds the model.

    Images have values in [-1, 1]; points, shape (D,), any. ``generator(z)`` takes (N, latent_dim) and gives (N,
    *shape); ``critic(x)`` gives one logit per sample, (N,). A model with ``classes`` takes labels, int64 (N,), as a
    second argument of both. ``recipe`` says how its paper trains it; :class:`genfast.training.Trainer` does so.

    A step has ``recipe.critic_steps`` phases of the critic, each with loss and penalty from one ``ops.critic_step``,
    and one of the generator. With ``recipe.lazy`` = k > 1 the penalty has an update of its own after every k-th one of
    the critic, k times as strong, and the critic's Adam has learning rate lr c and betas^c, c = k / (k + 1) (StyleGAN2,
    arXiv:1912.04958, appendix B). ``method`` is that of ``ops.critic_step``.
    """

    recipe: Recipe = Recipe()
    method = "auto"
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

    # ---- training ----

    @property
    def phases(self) -> tuple[tuple[str, ...], ...]:
        """The updates of a step, each by the player that it updates."""
        return (("critic",),) * self.recipe.critic_steps + (("generator",),)

    def player(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of "critic" or "generator"."""
        part: nn.Module = getattr(self, name)
        return part.parameters()

    def optimizer(self, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The recipe's optimiser of a player."""
        recipe = self.recipe
        lr, betas = getattr(recipe, f"{name}_lr"), recipe.betas
        if recipe.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr)
        if name == "critic" and recipe.lazy > 1 and recipe.penalties:  # k + 1 updates in the place of k
            c = recipe.lazy / (recipe.lazy + 1)
            lr, betas = lr * c, (betas[0] ** c, betas[1] ** c)
        return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)

    def losses(
        self,
        phase: tuple[str, ...],
        real: Tensor,
        *,
        generator: torch.Generator | None,
        step: int,
        context: tuple[Tensor, ...] = (),
        rows: slice = slice(None),
    ) -> Losses:
        """The losses of a phase; ``step`` counts the updates of this phase from 0.

        Args:
            real: data (N, *shape), and ``context`` their labels where the model takes some.
            rows: only these of the N, with the random numbers and the deviation of all: what one of several processes
                does.
        """
        z = self.latent(len(real), generator)[rows]
        context = tuple(c[rows] for c in context)
        if phase == ("generator",):
            return self._generator_losses(real[rows], z, context)
        with torch.no_grad():
            fake = self.generator(z, *context)
        recipe = self.recipe
        common: dict[str, Any] = {
            "weight": recipe.weight,
            "target": recipe.target,
            "context": context or None,
            "method": self.method,
        }

        def penalties(kinds: tuple[str, ...], where: list[dict[str, Any]]) -> Tensor:
            pairs = zip(kinds, where)
            values = [
                ops.gradient_penalty(self.critic, real[rows], fake, kind=kind, **common, **at) for kind, at in pairs
            ]
            return torch.stack(values).sum()

        def lazy_penalties() -> Losses:
            total = penalties(recipe.penalties, self._points(recipe.penalties, real, generator, rows))
            return Losses({"critic": recipe.lazy * total}, {"penalty": total})

        kinds = recipe.penalties if recipe.lazy == 1 else ()
        where = self._points(kinds, real, generator, rows)
        first = {"penalty": kinds[0], **where[0]} if kinds else {"penalty": None}
        values = ops.critic_step(self.critic, real[rows], fake, loss=recipe.loss, **first, **common)
        loss, penalty = values.loss, values.penalty if kinds else None
        if kinds[1:]:
            more = penalties(kinds[1:], where[1:])
            loss, penalty = loss + more, values.penalty + more
        due = recipe.lazy > 1 and recipe.penalties and (step + 1) % recipe.lazy == 0
        figures = {"critic": loss, "generator": None, "penalty": penalty}
        return Losses({"critic": loss}, figures, lazy_penalties if due else None)

    def _points(
        self, kinds: tuple[str, ...], real: Tensor, generator: torch.Generator | None, rows: slice
    ) -> list[dict[str, Any]]:
        """Where penalties of these kinds are taken: rows of what is drawn for all samples."""
        drawn: list[dict[str, Any]] = []
        for kind in kinds:
            if kind in ("dragan", "ar1"):
                drawn.append({"points": reference.penalty_points(real, None, kind, generator)[rows]})
            elif kind in ("wgan-gp", "wgan-lp"):
                epsilon = torch.rand(len(real), generator=generator, dtype=real.dtype).to(real.device)
                drawn.append({"epsilon": epsilon[rows]})
            else:
                drawn.append({})
        return drawn

    def _generator_losses(self, real: Tensor, z: Tensor, context: tuple[Tensor, ...]) -> Losses:
        with _without_gradient(self.critic):  # nobody needs that of its parameters here
            fake = self.critic(self.generator(z, *context), *context)
        with torch.no_grad():
            against = self.critic(real, *context) if self.recipe.loss in RELATIVISTIC else None
        loss = losses.generator_loss(self.recipe.loss, fake, against)
        return Losses({"generator": loss}, {"generator": loss})

    def updated(self, phase: tuple[str, ...]) -> None:
        """Clips the critic's weights after its updates where the recipe says so."""
        if phase == ("critic",) and self.recipe.clip is not None:
            losses.clip_weights_(self.critic, self.recipe.clip)

    def limits(self, first: dict[str, float]) -> dict[str, float]:
        """The size of each loss above which a run has diverged.

        The values of a critic with slope 1 differ by the diameter of the data, 2 sqrt(D) in [-1, 1]^D; D would be
        2.5e11 here.
        """
        return {"critic": 1e6, "generator": 1e6}

    # ---- samples ----

    def latent(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` latents (n, latent_dim) from N(0, 1), on the model's device whatever that of ``generator``."""
        like = next(self.parameters())
        where = like.device if generator is None else generator.device
        return torch.randn(n, self.latent_dim, generator=generator, device=where, dtype=like.dtype).to(like.device)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
        rows: slice | None = None,
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
                    f"{name}.sample: context has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected int64 "
                    f"({n},)"
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
        self,
        shape: Sequence[int],
        *,
        latent_dim: int | None = None,
        hidden: int = 256,
        depth: int = 3,
        width: int = 64,
        base: int = 4,
        kernel_size: int = 4,
    ) -> None:
        points = len(shape) == 1
        super().__init__(shape, (2 if points else 100) if latent_dim is None else latent_dim)
        self.config = {
            "shape": self.shape,
            "latent_dim": self.latent_dim,
            "hidden": hidden,
            "depth": depth,
            "width": width,
            "base": base,
            "kernel_size": kernel_size,
        }
        if points:
            self.generator, self.critic = mlp_networks(self.shape, self.latent_dim, hidden, depth)
        else:
            self.generator, self.critic = dcgan_networks(
                type(self).__name__, self.shape, self.latent_dim, width, base, kernel_size
            )
