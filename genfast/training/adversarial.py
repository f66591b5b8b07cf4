"""Training a generator against a critic: any loss, any penalty, runs that resume bit by bit, and pictures on the way."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import losses, models, ops, reference
from ..models import AdversarialModel, Recipe
from ..reference.adversarial import RELATIVISTIC
from . import checkpoints, distributed, metrics, pictures
from . import trainer as training
from .data import Dataset, Points
from .trainer import TrainingError

SIDES = ("critic", "generator")
# The values of a critic with slope 1 differ by the diameter of the data, 2 sqrt(D) in [-1, 1]^D; D would be 2.5e11 here.
DIVERGED = 1e6


class StepLosses(NamedTuple):
    """Of one step: the mean over its critic's updates, penalty included; the generator's; the mean of the penalties taken."""

    critic: float
    generator: float
    penalty: float


class AdversarialTrainer:
    """One adversarial model on one data set; repeats exactly from a seed or a checkpoint.

    A step is ``recipe.critic_steps`` updates of the critic, each with loss and penalty from one ``ops.critic_step``, and one of
    the generator. ``average`` is the generator's moving average, whose decay warms up as (1 + t) / (10 + t).

    With ``recipe.lazy`` = k > 1, the penalty has an update of its own after every k-th one of the critic, k times as strong,
    and the critic's Adam has learning rate lr c and betas^c, c = k / (k + 1) (StyleGAN2, arXiv:1912.04958, appendix B).

    On several ranks (see :mod:`genfast.distributed`) all are made and stepped together, and take the steps of one, but where a
    network or a loss couples the samples of a batch: batch normalisation and the like, and the loss "relativistic-average",
    see a rank's portion. Statistics that a network keeps are those of rank 0.

    Args:
        model: its ``recipe`` holds unless ``recipe`` is given.
        data: images become values in [-1, 1] with uniform dequantisation noise; points stay as they are.
        batch_size: over all ranks; at most the training set.
        seed: of batches, latents, labels, interpolation and dropout.
        method: of ``ops.critic_step``.

    Raises:
        ValueError: model and data that do not fit, a batch size below 1, or fewer samples in a batch than ranks.

    Example:
        >>> from genfast import data, models, training
        >>> points = data.points("8gaussians", count=100)
        >>> trainer = training.AdversarialTrainer(models.GAN((2,), hidden=8), points)
        >>> trainer.step().penalty
        0.0
    """

    def __init__(
        self, model: AdversarialModel, data: Dataset | Points, *, recipe: Recipe | None = None, batch_size: int = 64,
        seed: int = 0, device: str = "cpu", method: str = "auto",
    ) -> None:  # fmt: skip
        distributed.check_device(device)
        if batch_size < 1:
            raise ValueError(f"train: batch_size={batch_size}, expected at least 1")
        if model.shape != data.shape:
            raise ValueError(f"train: the model makes {model.shape} and the data are {data.shape}")
        self.labels = data.train_labels if model.classes is not None else None
        if model.classes is not None:
            if self.labels is None:
                raise ValueError(f"train: the model has classes={model.classes}, and {data.name} has no labels")
            if int(self.labels.max()) >= model.classes:
                raise ValueError(f"train: the model has classes={model.classes}, and a label is {int(self.labels.max())}")
        self.model, self.data, self.device, self.method = model.to(device), data, device, method
        self.recipe = model.recipe if recipe is None else recipe
        self.batch_size = distributed.check_batch(min(batch_size, len(data.train)))
        self.portion, self.weight = distributed.portion(self.batch_size), distributed.weight(self.batch_size)
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global one
        self.objectives = {
            "critic": distributed.parallel(distributed.Objective(model.critic, self._critic_loss)),
            "generator": distributed.parallel(distributed.Objective(model.generator, self._generator_loss)),
        }
        self.average = copy.deepcopy(model.generator).requires_grad_(False).eval()
        self.trained = {
            side: [p for p in part.parameters() if p.requires_grad]
            for side, part in (("generator", model.generator), ("critic", model.critic))
        }
        self.optimizers = {side: self._optimizer(side) for side in self.trained}
        self.history: list[StepLosses] = []
        self.critic_updates = 0

    def _optimizer(self, side: str) -> torch.optim.Optimizer:
        recipe, parameters = self.recipe, self.trained[side]
        lr, betas = getattr(recipe, f"{side}_lr"), recipe.betas
        if recipe.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr)
        if side == "critic" and recipe.lazy > 1 and recipe.penalties:  # k + 1 updates in the place of k
            c = recipe.lazy / (recipe.lazy + 1)
            lr, betas = lr * c, (betas[0] ** c, betas[1] ** c)
        return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)

    # ---- what a step is made of ----

    def batch(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next real samples, over all ranks, and their labels where the model takes some."""
        index = torch.randint(len(self.data.train), (self.batch_size,), generator=self.generator)
        real = self.data.train[index]
        if isinstance(self.data, Dataset):
            real = 2 * models.dequantize(real, self.data.bins, generator=self.generator)
        context = () if self.labels is None else (self.labels[index].to(self.device),)
        return real.to(self.device), context

    def _latent(self) -> Tensor:
        """This rank's of the latents for a batch."""
        return self.model.latent(self.batch_size, self.generator)[self.portion]

    def _points(self, kinds: tuple[str, ...], real: Tensor) -> list[dict[str, Tensor]]:
        """Where penalties of these kinds are taken: this rank's part of what is drawn for the whole batch ``real``."""
        drawn: list[dict[str, Tensor]] = []
        for kind in kinds:
            if kind in ("dragan", "ar1"):
                points = reference.penalty_points(real, None, kind, self.generator)
                drawn.append({"points": points[self.portion]})
            elif kind in ("wgan-gp", "wgan-lp"):
                epsilon = torch.rand(self.batch_size, generator=self.generator, dtype=real.dtype).to(real.device)
                drawn.append({"epsilon": epsilon[self.portion]})
            else:
                drawn.append({})
        return drawn

    def _critic_loss(
        self, real: Tensor, fake: Tensor, context: tuple[Tensor, ...], kinds: tuple[str, ...], drawn: list[dict[str, Any]],
        alone: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Of this rank's samples: (what it descends, its share of the penalty); ``alone``: penalties without the loss."""
        recipe, critic, penalty = self.recipe, self.model.critic, None
        common: dict[str, Any] = {
            "weight": recipe.weight, "target": recipe.target, "context": context or None, "method": self.method,
        }  # fmt: skip
        first = 0 if alone else 1
        try:
            values = []
            if not alone:
                step = ops.critic_step(
                    critic, real, fake, loss=recipe.loss, penalty=kinds[0] if kinds else None, **common,
                    **(drawn[0] if drawn else {}),
                )  # fmt: skip
                loss, penalty = step.loss, step.penalty if kinds else None
            for kind, points in zip(kinds[first:], drawn[first:]):
                values.append(ops.gradient_penalty(critic, real, fake, kind=kind, **common, **points))
            if values:
                more = torch.stack(values).sum()
                loss, penalty = (recipe.lazy * more, more) if alone else (loss + more, step.penalty + more)
        except FloatingPointError:
            if distributed.size() == 1:
                raise
            # so that all ranks stop together, with a gradient for each parameter that the others wait for
            loss = torch.stack([p.sum() for p in self.trained["critic"]]).sum() * math.nan
        return loss * self.weight, None if penalty is None else penalty.detach() * self.weight

    def critic_update(self) -> tuple[float, float | None]:
        """One update of the critic; (its loss, the penalty if one was taken)."""
        recipe = self.recipe
        whole, context = self.batch()
        real, context = whole[self.portion], tuple(c[self.portion] for c in context)
        with torch.no_grad():
            fake = self.model.generator(self._latent(), *context)
        kinds = recipe.penalties if recipe.lazy == 1 else ()
        loss, penalty = self.objectives["critic"](real, fake, context, kinds, self._points(kinds, whole), alone=False)
        value = self._descend("critic", loss)
        self.critic_updates += 1
        if recipe.lazy > 1 and recipe.penalties and self.critic_updates % recipe.lazy == 0:
            drawn = self._points(recipe.penalties, whole)
            loss, penalty = self.objectives["critic"](real, fake, context, recipe.penalties, drawn, alone=True)
            self._descend("critic", loss, "penalty")
        if recipe.clip is not None:
            losses.clip_weights_(self.model.critic, recipe.clip)
        return value, None if penalty is None else self._mean(penalty)

    def _generator_loss(self, real: Tensor, z: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        recipe, critic = self.recipe, self.model.critic
        fake = critic(self.model.generator(z, *context), *context)
        with torch.no_grad():
            against = critic(real, *context) if recipe.loss in RELATIVISTIC else None
        return losses.generator_loss(recipe.loss, fake, against) * self.weight

    def generator_update(self) -> float:
        """One update of the generator; returns its loss."""
        real, context = self.batch()
        for p in self.trained["critic"]:  # whose gradients nobody needs here
            p.requires_grad_(False)
        try:
            context = tuple(c[self.portion] for c in context)
            return self._descend("generator", self.objectives["generator"](real[self.portion], self._latent(), context))
        finally:
            for p in self.trained["critic"]:
                p.requires_grad_(True)

    def _mean(self, share: Tensor) -> float:
        """Of a rank's weighted mean, that of the whole batch."""
        return distributed.total(float(share.detach()))[0] / distributed.size()

    def _descend(self, side: str, loss: Tensor, what: str = "loss") -> float:
        """One step of the optimiser of ``side``, or an error on all ranks before it where loss or gradient are not finite."""
        optimizer = self.optimizers[side]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        value = self._mean(loss)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained[side] if p.grad is not None]))
        if not math.isfinite(value) or not math.isfinite(norm):
            said = f"{what} is {value}" if not math.isfinite(value) else f"{what} has a gradient of norm {norm}"
            raise TrainingError(
                f"the {side}'s {said} at step {len(self.history) + 1}: lower the learning rate or raise the penalty's weight"
            )
        optimizer.step()
        return value

    @torch.no_grad()
    def _follow(self) -> None:
        t = len(self.history)
        ours: list[Tensor] = list(self.average.parameters())
        theirs: list[Tensor] = list(self.model.generator.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - min(self.recipe.ema, (1 + t) / (10 + t)))
        for a, b in zip(self.average.buffers(), self.model.generator.buffers()):
            a.copy_(b)

    def step(self) -> StepLosses:
        """The critic's updates, the generator's, and the average's.

        Raises:
            TrainingError: a loss, a penalty or a gradient is not finite; the weights are those before the update.
        """
        if distributed.size() > 1:  # one process goes on with the numbers that torch draws
            distributed.seed(self.seed, len(self.history))
        if not self.model.training:  # parts that their owner has frozen by eval stay frozen
            self.model.train()
        updates = [self.critic_update() for _ in range(self.recipe.critic_steps)]
        generator = self.generator_update()
        self._follow()
        penalties = [p for _, p in updates if p is not None]
        mean = sum(penalties) / len(penalties) if penalties else 0.0
        self.history.append(StepLosses(sum(c for c, _ in updates) / len(updates), generator, mean))
        return self.history[-1]

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """``n`` samples of the averaged generator, the same latents for the same seed; all ranks call this together."""
        distributed.share(self.average.buffers())
        live, self.model.generator = self.model.generator, self.average
        try:
            return distributed.sample(self.model, n, generator=torch.Generator().manual_seed(seed))
        finally:
            self.model.generator = live

    def diverged(self) -> str | None:
        """What to say of a run with a loss that no critic of its data can have, judged by its last steps."""
        for side in SIDES if self.history else ():
            value = statistics.median(abs(getattr(h, side)) for h in self.history[-training.RECENT :])
            if not value <= DIVERGED:
                return (
                    f"the run diverged: the {side}'s loss is {value:.4g} after {len(self.history)} steps: lower the learning "
                    "rate or raise the penalty's weight"
                )
        return None

    # ---- checkpoints ----

    def weights(self) -> dict[str, Tensor]:
        """The model with the averaged generator: what samples are drawn from."""
        found = self.model.state_dict()
        return found | {f"generator.{k}": v for k, v in self.average.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside :meth:`weights`; see :func:`genfast.checkpoints.save`."""
        distributed.share([*self.model.buffers(), *self.average.buffers()])  # each rank has its own batch statistics
        return {
            "step": len(self.history), "history": [list(h) for h in self.history], "critic_updates": self.critic_updates,
            "recipe": dataclasses.asdict(self.recipe), "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimizers": {side: checkpoints.optimizer_state(self._part(side), o) for side, o in self.optimizers.items()},
            "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
        }  # fmt: skip

    def _part(self, side: str) -> nn.Module:
        part: nn.Module = getattr(self.model, side)
        return part

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint, of any number of ranks, as if there had been no stop.

        Raises:
            ValueError: the checkpoint's recipe is another.
        """
        trained_with = kept_recipe(checkpoint)
        if trained_with != self.recipe:
            raise ValueError(f"train: {str(checkpoint)!r} was trained with {trained_with}, not {self.recipe}")
        state = self.state()
        checkpoints.restore(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.history = [StepLosses(*h) for h in state["history"]]
        self.critic_updates = state["critic_updates"]
        for side, optimizer in self.optimizers.items():
            checkpoints.set_optimizer_state(self._part(side), optimizer, state["optimizers"][side])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


def kept_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was trained with."""
    fields: dict[str, Any] = checkpoints.notes(checkpoint, ["recipe"])["recipe"]
    expected = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(fields, dict) or set(fields) != expected:
        raise ValueError(f"train: {str(checkpoint)!r} has recipe={fields!r}, expected {', '.join(sorted(expected))}")
    fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    return Recipe(**fields)


# ---- the loop ----


def _config(name: str, data: Dataset | Points, config: dict[str, Any]) -> dict[str, Any]:
    """The model's config with what the data decide."""
    if name not in models.NAMES or not issubclass(models.NAMES[name], AdversarialModel):
        known = [k for k, v in models.NAMES.items() if issubclass(v, AdversarialModel)]
        raise ValueError(f"train: {name!r} is no adversarial model, expected one of {', '.join(known)}")
    found: dict[str, Any] = {"shape": data.shape}
    taken = inspect.signature(models.NAMES[name]).parameters
    if "base" in taken and len(data.shape) == 3 and data.shape[1] < 16:
        found["base"] = 2  # so that 8 x 8 images have two stages
    if name == "cgan":
        if data.train_labels is None:
            raise ValueError(f"train: cgan needs labels, and {data.name} has none")
        found["classes"] = int(data.train_labels.max()) + 1
    return found | config


@checkpoints.holding_folder
def train(
    name: str, data: Dataset | Points, out: str | Path, *, config: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None, steps: int | None = None, minutes: float | None = None, batch_size: int = 64,
    seed: int = 0, device: str = "cpu", resume: bool = False, save_every: int = 200, sample_every: int = 500,
    method: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Trains the adversarial model ``models.NAMES[name]`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``log.csv``, ``loss.png``, ``samples.png``, ``metrics.json``, and in
    ``progress/`` the same latents drawn every so often. Checkpoints hold the averaged generator as the model and the rest
    beside it, so ``genfast sample`` and ``training.load_checkpoint`` read them. Ctrl-C and SIGTERM write a last checkpoint and
    then raise KeyboardInterrupt. A picture that cannot be drawn is a line on standard error.

    Args:
        config: of the model, beside what the data decide.
        recipe: fields of :class:`genfast.models.Recipe` that replace the model's own.
        steps, minutes: whichever ends first; 1000 steps without either. A step is one update of the generator.
        out: the folder.
        resume: goes on from the newest checkpoint there, with the recipe it was trained with.
        batch_size: over all ranks.
        sample_every: steps between two pictures; 0 for none on the way.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is no checkpoint, or it lacks a file.
        BlockingIOError: another process trains in ``out``.
        ValueError: model, data and recipe that do not fit each other or the checkpoint, or a checkpoint that is damaged.
        ImportError: matplotlib, which draws the curves, is not installed.
        TrainingError: a loss or a gradient is not finite, or a loss is larger than any critic's.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    training.check_plots()
    training.check_length(steps, minutes)
    if sample_every < 0:
        raise ValueError(f"train: sample_every={sample_every}, expected at least 0")
    torch.manual_seed(seed)
    found = _config(name, data, config or {})
    model, checkpoint = checkpoints.begin(out, name, resume, found)
    chosen = dataclasses.replace(model.recipe, **(recipe or {}))
    if checkpoint is not None and not recipe:
        chosen = kept_recipe(checkpoint)
    trainer = AdversarialTrainer(model, data, recipe=chosen, batch_size=batch_size, seed=seed, device=device, method=method)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    began = len(trainer.history)
    test = data.test[:2000] if isinstance(data, Points) else None
    contours = model.critic if model.classes is None else None

    def picture(path: Path) -> None:
        if isinstance(data, Dataset) or data.shape == (2,):
            drawn = trainer.sample(64 if test is None else 2000)
            if distributed.first():
                pictures.draw(drawn, path, bins=data.bins, real=test, critic=contours)

    def save() -> None:
        checkpoints.save(out, name, model, trainer.state(), data.bins, trainer.weights())

    def every() -> None:
        if sample_every and len(trainer.history) % sample_every == 0:
            training.attempt(picture, out / "progress" / f"step-{len(trainer.history):07d}.png")

    seconds = training.loop(
        lambda: trainer.step()._asdict(), lambda: len(trainer.history), save, out, title=f"{name} on {data.name}", steps=steps,
        minutes=minutes, save_every=save_every, every=every, diverged=trainer.diverged,
    )  # fmt: skip
    tail = trainer.history[-50:]
    written: dict[str, Any] = {
        "model": name, "data": data.name, "steps": len(trainer.history), "recipe": dataclasses.asdict(trainer.recipe),
        "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds,
        "steps_per_second": (len(trainer.history) - began) / seconds if seconds else 0.0,
    }  # fmt: skip
    written |= {f"{k}_loss": sum(getattr(h, k) for h in tail) / max(1, len(tail)) for k in ("critic", "generator")}
    if isinstance(data, Points) and data.centres is not None:
        scores = metrics.mode_scores(trainer.sample(10_000), data.centres, data.std)
        written |= {"modes": len(data.centres)} | scores._asdict()

    def curves(path: Path) -> None:
        if distributed.first():
            pictures.plot_losses({side: [getattr(h, side) for h in trainer.history] for side in SIDES}, path, ylabel="loss")

    training.write_results(written, {"loss.png": curves, "samples.png": picture}, out)
    read: dict[str, Any] = json.loads(json.dumps(written))
    return read
