"""The steps that train a model: batches, noise, updates and averages that repeat exactly from a seed or a
checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import losses, models
from .._modes import evaluating
from ..models import AdversarialModel, AutoencoderModel, AutoregressiveModel, Recipe
from ..models.phases import Losses
from . import checkpoints, distributed
from .data import Dataset, Points

Model = models.DensityModel | AutoregressiveModel | AdversarialModel | AutoencoderModel
RECENT = 50  # steps over which a run is judged
IMPORTANCE_SAMPLES = 64


class TrainingError(RuntimeError):
    """Training cannot go on: a run that diverges. Checkpoints that it has written stay."""


class Density:
    """How a density of images is trained, by bits per dimension: what models of other kinds say of themselves.

    Args:
        bins: the levels of the images.
    """

    phases = (("model",),)

    def __init__(self, model: Any, bins: int) -> None:
        self.model, self.bins = model, bins

    def player(self, name: str) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.model.parameters())

    def bits(self, images: Tensor, generator: torch.Generator, rows: slice) -> Tensor:
        """Bits per dimension of ``rows`` of images (N, *shape) in [0, bins); of a flow with noise, so that they are a
        bound."""
        like = next(self.model.parameters())
        if isinstance(self.model, AutoregressiveModel):
            return self.model.bits_per_dim(images[rows].to(like.device))
        x = models.dequantize(images, self.bins, generator=generator)[rows].to(like)
        bits: Tensor = (math.log(self.bins) - self.model.log_prob(x) / self.model.dim) / math.log(2)
        return bits

    def losses(
        self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator, step: int, rows: slice
    ) -> Losses:
        """The mean of the bits per dimension."""
        mean = self.bits(images, generator, rows).mean()
        return Losses({"model": mean}, {"bits_per_dim": mean.detach()})

    def figures(self, images: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """The bits per dimension of held-out images, each computed by one rank."""
        return {"bits_per_dim": distributed.gather(self.bits(images, generator, distributed.portion(len(images))))}

    def limits(self, first: dict[str, float]) -> dict[str, float]:
        """Ten times the bits of guessing, or of the first step."""
        return {"bits_per_dim": 10 * max(first["bits_per_dim"], math.log2(self.bins))}


class Trainer:
    """One model on one data set: batches, noise and updates that repeat exactly from a seed or a checkpoint.

    A step runs the phases that the model has, in order: the losses of a phase's players from one pass over a batch,
    then an update of each player by its own loss. Flows and autoregressive models have one phase and one player.

    Of an adversarial model each phase has a batch of its own, and ``average`` is the generator's moving average, whose
    decay warms up as (1 + t) / (10 + t).

    On several ranks (see :mod:`genfast.distributed`) all are made and stepped together, and take the steps of one, but
    where a network or a loss couples the samples of a batch, which then see a rank's portion: batch normalisation, the
    loss "relativistic-average", the discrepancy of a WAE, the KL of mean activations. Statistics that a network keeps
    are those of rank 0.

    Args:
        data: images; points too for an adversarial model, which sees images as values in [-1, 1] with dequantisation
            noise.
        recipe: of an adversarial model, in the place of its own.
        batch_size: over all ranks; at most the training set.
        lr: of Adam, 1e-3 by default; an adversarial model's are those of its recipe.
        seed: of batches, noise, latents, labels, corruption and dropout.
        clip: the largest norm of a player's gradient; by default 50 for densities, 1000 for autoencoders, none for
            adversarial models.
        parallel: of densities, a strategy of :func:`genfast.distributed.parallel`. With "fsdp" the parameters of
            ``model`` become shards.

    Raises:
        ValueError: model and data that do not fit, fewer samples in a batch than ranks, or a strategy that cannot be.

    Example:
        >>> from genfast import data, models, training
        >>> digits = data.load("digits")
        >>> trainer = training.Trainer(models.Glow(digits.shape, levels=1, steps=1, hidden=4), digits)
        >>> trainer.step()["bits_per_dim"] > 0
        True
    """

    def __init__(
        self,
        model: Model,
        data: Dataset | Points,
        *,
        recipe: Recipe | None = None,
        batch_size: int = 64,
        lr: float | None = None,
        seed: int = 0,
        device: str = "cpu",
        clip: float | None = None,
        parallel: str = "ddp",
    ) -> None:
        distributed.check_strategy(parallel)
        distributed.check_device(device)
        if batch_size < 1:
            raise ValueError(f"train: batch_size={batch_size}, expected at least 1")
        self.model, self.data, self.device = model.to(device), data, device
        self.adversarial = isinstance(model, AdversarialModel)
        density = not isinstance(model, AdversarialModel | AutoencoderModel)
        _check_fit(model, data)
        self.task = cast(Any, Density(model, data.bins) if density else model)
        self.labels = data.train_labels if getattr(model, "classes", None) is not None else None
        if isinstance(model, AdversarialModel):
            model.recipe = model.recipe if recipe is None else recipe
            torch.manual_seed(seed)  # dropout draws from the global one
        elif recipe is not None:
            raise ValueError(f"train: a recipe is for adversarial models, and the model is a {type(model).__name__}")
        if not density and parallel != "ddp":
            raise ValueError(f"train: parallel={parallel!r} is for flows and autoregressive models, expected 'ddp'")
        self.clip = clip if clip is not None else 50.0 if density else math.inf if self.adversarial else 1000.0
        self.batch_size = distributed.check_batch(min(batch_size, len(data.train)))
        self.rows, self.weight = distributed.portion(self.batch_size), distributed.weight(self.batch_size)
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []
        self.objective: nn.Module | None = None
        if density:
            if distributed.size() > 1 or parallel == "fsdp":
                self._initialize()
            self.objective = distributed.parallel(distributed.Objective(model, self._losses), parallel)
        else:
            distributed.share([*model.parameters(), *model.buffers()])
        self.average: nn.Module | None = None
        if isinstance(model, AdversarialModel):
            self.average = copy.deepcopy(model.generator).requires_grad_(False).eval()
        names = dict.fromkeys(player for phase in self.task.phases for player in phase)
        self.players = {name: [p for p in self.task.player(name) if p.requires_grad] for name in names}
        self.optimizers = {name: self._optimizer(name, lr) for name in self.players}

    @property
    def recipe(self) -> Recipe | None:
        """How an adversarial model is trained."""
        return getattr(self.model, "recipe", None)

    def _optimizer(self, name: str, lr: float | None) -> torch.optim.Optimizer:
        if isinstance(self.model, AdversarialModel):
            return self.model.optimizer(name, self.players[name])
        betas = getattr(self.task, "betas", (0.9, 0.999))
        return torch.optim.Adam(self.players[name], lr=1e-3 if lr is None else lr, betas=betas, fused=True)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Sets what is set from the first batch, as the first step would: wrapped, a model's weights are not its own to
        set."""
        if any(getattr(m, "_pending", False) for m in self.model.modules()):
            before = self.generator.get_state()
            distributed.seed(self.seed)
            self._to_training()
            self._losses(self.task.phases[0], *self.batch(), 0)
            self.generator.set_state(before)

    def _to_training(self) -> None:
        """Puts the model into training mode, unless it is: parts that its owner has frozen by ``eval`` stay frozen."""
        if not self.model.training:
            (self.objective or self.model).train()

    # ---- a step ----

    def batch(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next batch of training data, over all ranks, and their labels where the model takes some."""
        index = torch.randint(len(self.data.train), (self.batch_size,), generator=self.generator)
        samples = self.data.train[index]
        if self.adversarial:
            if isinstance(self.data, Dataset):
                samples = 2 * models.dequantize(samples, self.data.bins, generator=self.generator)
            samples = samples.to(self.device)
        return samples, () if self.labels is None else (self.labels[index].to(self.device),)

    def _losses(self, phase: tuple[str, ...], samples: Tensor, context: tuple[Tensor, ...], step: int) -> Losses:
        """What the model says of a phase on this rank's part of a batch; random numbers are drawn for all ranks."""
        options: dict[str, Any] = {"generator": self.generator, "step": step}
        if isinstance(self.model, AutoencoderModel):
            with distributed.drawn_for_all(self.batch_size, self.generator):
                return self.model.losses(phase, samples[self.rows], **options)
        options |= {"context": context} if context else {}
        values: Losses = self.task.losses(phase, samples, rows=self.rows, **options)
        return values

    def update(
        self, phase: tuple[str, ...], batch: tuple[Tensor, tuple[Tensor, ...]] | None = None, step: int = 0
    ) -> dict[str, float | None]:
        """Updates the players of a phase, after ``step`` other times, on a new batch by default; returns the
        figures."""
        compute = self._losses if self.objective is None else self.objective
        values = self._descend(phase, lambda: compute(phase, *(batch or self.batch()), step))
        figures = self._figures(values)
        if values.then is not None:
            figures |= self._figures(self._descend(phase, values.then, "penalty"))
        if self.adversarial:
            self.task.updated(phase)
        return figures

    def _descend(self, phase: tuple[str, ...], compute: Callable[[], Losses], what: str = "loss") -> Losses:
        """One update of the players of a phase, each by its loss."""
        try:
            values = compute()
        except FloatingPointError:
            if distributed.size() == 1:
                raise
            # so that all ranks stop together, in the check of the gradients
            sums = {name: torch.stack([p.sum() for p in self.players[name]]).sum() for name in phase}
            values = Losses({name: s * math.nan for name, s in sums.items()}, {})
        for name in phase:
            self._differentiate(name, values.players[name] * self.weight, what, last=name == phase[-1])
        for name in phase:
            self.optimizers[name].step()
        return values

    def _differentiate(self, name: str, loss: Tensor, what: str, last: bool) -> None:
        """Leaves the player's gradient of its loss in ``grad``, or raises TrainingError, on all ranks, if it is not
        finite."""
        parameters = self.players[name]
        if self.objective is not None:  # whose wrapper averages gradients while they are computed
            self.optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        else:  # several losses of one pass, each for parameters of its own, which DistributedDataParallel cannot have
            gradients = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
            for p, g in zip(parameters, gradients):  # fused optimisers want the parameter's strides
                p.grad = g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            distributed.average([p.grad for p in parameters if p.grad is not None])
        value = distributed.total(float(loss.detach()))[0] / distributed.size()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = float(distributed.full(norm))
        if not math.isfinite(value) or not math.isfinite(size):
            whose = "the" if name == "model" else f"the {name}'s"
            fault = f"{what} is {value}" if not math.isfinite(value) else f"{what} has a gradient of norm {size}"
            raise TrainingError(f"{whose} {fault} at step {len(self.history) + 1}: {self._advice}")
        if self.clip < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)

    def _figures(self, values: Losses) -> dict[str, float | None]:
        """The figures over all ranks, whose means count by the length of their portions."""
        present = {
            name: float(value.detach()) * self.weight for name, value in values.figures.items() if value is not None
        }
        sums = distributed.total(*present.values())
        return dict.fromkeys(values.figures) | {name: s / distributed.size() for name, s in zip(present, sums)}

    @property
    def _advice(self) -> str:
        return "lower the learning rate" + (" or raise the penalty's weight" if self.adversarial else "")

    def step(self) -> dict[str, float]:
        """One step; returns its figures by name, over all ranks, means over the phases that have them.

        Raises:
            TrainingError: a loss or a gradient is not finite, on all ranks together; the weights are those before the
                phase.
        """
        if distributed.size() > 1:  # one process goes on with the numbers that torch draws
            distributed.seed(self.seed, len(self.history))
        self._to_training()
        phases, updates = self.task.phases, []
        batch = None if self.adversarial else self.batch()
        for i, phase in enumerate(phases):
            before = len(self.history) * phases.count(phase) + phases[:i].count(phase)
            updates.append(self.update(phase, batch, before))
        figures = {}
        for name in dict.fromkeys(name for update in updates for name in update):
            values = [v for update in updates if (v := update.get(name)) is not None]
            figures[name] = sum(values) / len(values) if values else 0.0
        if self.average is not None:
            self._follow()
        self.history.append(figures)
        return figures

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the average towards the generator.

        AveragedModel of torch.optim.swa_utils would begin with the weights after the first step, and this one with
        those before it.
        """
        t, average, live = len(self.history), self.average, self.task.generator
        assert average is not None
        decay = min(self.task.recipe.ema, (1 + t) / (10 + t))
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
        for a, b in zip(average.buffers(), live.buffers()):
            a.copy_(b)

    # ---- what it has come to ----

    @torch.no_grad()
    def evaluate(self, limit: int = 1024) -> dict[str, float]:
        """The model's figures on the test images, means, with noise from a fixed seed; none of an adversarial model."""
        if self.adversarial:
            return {}
        images, generator = self.data.test[:limit], torch.Generator().manual_seed(1)
        with evaluating(self.model):
            task = self.task if self.objective is None else Density(distributed.whole(self.model), self.data.bins)
            parts = [task.figures(b, generator=generator) for b in images.split(256)]
            means = {name: float(torch.cat([p[name] for p in parts]).double().mean()) for name in parts[0]}
            if isinstance(self.model, models.VAE):
                bound = _importance_weighted_bound(self.model, images, generator)
                means |= {
                    "importance_weighted_bound": bound,
                    "bits_per_dim": losses.bits_per_dim(means["elbo"], self.model.dim),
                    "importance_weighted_bits_per_dim": losses.bits_per_dim(bound, self.model.dim),
                }
        return means

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n`` samples of an adversarial model with its averaged generator, the same latents for the same seed; all
        ranks call this together."""
        assert self.average is not None
        distributed.share(self.average.buffers())
        live, self.task.generator = self.task.generator, self.average
        try:
            return distributed.sample(self.model, n, generator=torch.Generator().manual_seed(seed))
        finally:
            self.task.generator = live

    def diverged(self, held_out: dict[str, float] | None = None) -> str | None:
        """What to say of a run with a figure that is far too large, in its last steps or on ``held_out`` images."""
        if not self.history:
            return None
        for name, limit in self.task.limits(self.history[0]).items():
            recent = [abs(h[name]) for h in self.history[-RECENT:]]
            value = statistics.median(recent) if held_out is None else abs(held_out.get(name, 0.0))
            if not value <= limit:  # nan neither
                what, first = name.replace("bits_per_dim", "bits/dim"), self.history[0][name]
                where = f"after {len(self.history)} steps" if held_out is None else "on held-out images"
                return f"the run diverged: {value:.4g} {what} {where}, {first:.4g} at its first step: {self._advice}"
        return None

    # ---- checkpoints ----

    def weights(self) -> dict[str, Tensor]:
        """The model as samples are drawn from it, an adversarial one with its averaged generator."""
        state: dict[str, Tensor] = self.model.state_dict()
        if self.average is not None:
            state |= {f"generator.{k}": v for k, v in self.average.state_dict().items()}
        return state

    def _part(self, player: str) -> nn.Module:
        """The module whose names of parameters the state of an optimiser has."""
        return getattr(self.model, player) if self.adversarial else self.model

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside :meth:`weights`; see :func:`genfast.checkpoints.save`."""
        state: dict[str, Any] = {
            "step": len(self.history),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": {
                name: checkpoints.optimizer_state(self._part(name), o) for name, o in self.optimizers.items()
            },
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        if self.average is not None:
            distributed.share(
                [*self.model.buffers(), *self.average.buffers()]
            )  # each rank has its own batch statistics
            state |= {"recipe": dataclasses.asdict(self.task.recipe), "average": self.average.state_dict()}
        return state

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint, of any number of ranks, as if there had been no stop.

        Raises:
            ValueError: the checkpoint's recipe is another.
        """
        if self.adversarial and (recipe := checkpoint_recipe(checkpoint)) != self.recipe:
            raise ValueError(f"train: {str(checkpoint)!r} was trained with {recipe}, not {self.recipe}")
        state = self.state()
        curve = self.objective is not None and "losses" in checkpoints.notes(checkpoint)
        if curve:  # of a version that had one list of losses and one optimiser
            state |= {"losses": state.pop("history"), "optimizer": state.pop("optimizers")["model"]}
        checkpoints.restore(checkpoint, state)
        if curve:
            state |= {
                "history": [{"bits_per_dim": v} for v in state["losses"]],
                "optimizers": {"model": state["optimizer"]},
            }
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        names = ("critic", "generator", "penalty")  # a version before had only the numbers
        self.history = [dict(h) if isinstance(h, dict) else dict(zip(names, h)) for h in state["history"]]
        for name, optimizer in self.optimizers.items():
            checkpoints.set_optimizer_state(self._part(name), optimizer, state["optimizers"][name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


def _check_fit(model: Any, data: Dataset | Points) -> None:
    """Raises ValueError for a model and data that do not fit each other."""
    adversarial = isinstance(model, AdversarialModel)
    if model.shape != data.shape:
        does = "makes" if adversarial else "takes"
        raise ValueError(f"train: the model {does} {model.shape} and the data are {data.shape}")
    if isinstance(model, AutoregressiveModel | AutoencoderModel) and model.levels != data.bins:
        raise ValueError(f"train: the model has levels={model.levels} and the data have {data.bins}")
    if adversarial and model.classes is not None:
        if data.train_labels is None:
            raise ValueError(f"train: the model has classes={model.classes}, and {data.name} has no labels")
        if int(data.train_labels.max()) >= model.classes:
            raise ValueError(
                f"train: the model has classes={model.classes}, and a label is {int(data.train_labels.max())}"
            )


def _importance_weighted_bound(model: models.VAE, images: Tensor, generator: torch.Generator) -> float:
    """The mean bound of many samples in nats, each image's computed by one rank."""
    bounds = []
    for b in images.split(256):
        part = b[distributed.portion(len(b))]
        with distributed.drawn_for_all(len(b), generator):
            bound = model.importance_weighted_bound(part, IMPORTANCE_SAMPLES, generator=generator)
        bounds += [bound * len(part)] if len(part) else []
    total = distributed.total(float(torch.stack(bounds).double().sum()) if bounds else 0.0)[0]
    return total / len(images)


def checkpoint_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was trained with."""
    fields: dict[str, Any] = checkpoints.notes(checkpoint, ["recipe"])["recipe"]
    expected = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(fields, dict) or set(fields) != expected:
        raise ValueError(f"train: {str(checkpoint)!r} has recipe={fields!r}, expected {', '.join(sorted(expected))}")
    fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return Recipe(**fields)
