"""Training a generator against a critic: any loss, any penalty, runs that resume bit by bit, and pictures on the way."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import losses, metrics, models, ops, training
from .data import Dataset, Points
from .models import AdversarialModel, Recipe
from .reference.adversarial import RELATIVISTIC
from .training import TrainingError


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

    Args:
        model: its ``recipe`` holds unless ``recipe`` is given.
        data: images become values in [-1, 1] with uniform dequantisation noise; points stay as they are.
        batch_size: at most the training set.
        seed: of batches, latents, labels, interpolation and dropout.
        method: of ``ops.critic_step``.

    Raises:
        ValueError: model and data that do not fit, or a batch size below 1.

    Example:
        >>> from genfast import adversarial_training, data, models
        >>> points = data.points("8gaussians", count=100)
        >>> trainer = adversarial_training.AdversarialTrainer(models.GAN((2,), hidden=8), points)
        >>> trainer.step().penalty
        0.0
    """

    def __init__(
        self, model: AdversarialModel, data: Dataset | Points, *, recipe: Recipe | None = None, batch_size: int = 64,
        seed: int = 0, device: str = "cpu", method: str = "auto",
    ) -> None:  # fmt: skip
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
        self.batch_size = min(batch_size, len(data.train))
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global one
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
        """The next real samples, and their labels where the model takes some."""
        index = torch.randint(len(self.data.train), (self.batch_size,), generator=self.generator)
        real = self.data.train[index]
        if isinstance(self.data, Dataset):
            real = 2 * models.dequantize(real, self.data.bins, generator=self.generator)
        context = () if self.labels is None else (self.labels[index].to(self.device),)
        return real.to(self.device), context

    def critic_update(self) -> tuple[float, float | None]:
        """One update of the critic; (its loss, the penalty if one was taken)."""
        recipe, critic = self.recipe, self.model.critic
        real, context = self.batch()
        with torch.no_grad():
            fake = self.model.generator(self.model.latent(len(real), self.generator), *context)
        kinds = recipe.penalties if recipe.lazy == 1 else ()
        step = ops.critic_step(
            critic, real, fake, loss=recipe.loss, penalty=kinds[0] if kinds else None, weight=recipe.weight,
            target=recipe.target, context=context or None, generator=self.generator, method=self.method,
        )  # fmt: skip
        penalty = None if not kinds else step.penalty
        if len(kinds) > 1:
            more = self._penalty(kinds[1:], real, fake, context)
            step, penalty = step._replace(loss=step.loss + more), step.penalty + more
        value = self._descend("critic", step.loss)
        self.critic_updates += 1
        if recipe.lazy > 1 and recipe.penalties and self.critic_updates % recipe.lazy == 0:
            penalty = self._penalty(recipe.penalties, real, fake, context)
            self._descend("critic", recipe.lazy * penalty, "penalty")
        if recipe.clip is not None:
            losses.clip_weights_(critic, recipe.clip)
        return value, None if penalty is None else float(penalty.detach())

    def _penalty(self, kinds: tuple[str, ...], real: Tensor, fake: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        values = []
        for kind in kinds:
            value = ops.gradient_penalty(
                self.model.critic, real, fake, kind=kind, weight=self.recipe.weight, target=self.recipe.target,
                context=context or None, generator=self.generator, method=self.method,
            )  # fmt: skip
            assert isinstance(value, Tensor)
            values.append(value)
        return torch.stack(values).sum()

    def generator_update(self) -> float:
        """One update of the generator; returns its loss."""
        recipe, critic = self.recipe, self.model.critic
        real, context = self.batch()
        for p in self.trained["critic"]:  # whose gradients nobody needs here
            p.requires_grad_(False)
        try:
            fake = critic(self.model.generator(self.model.latent(len(real), self.generator), *context), *context)
            with torch.no_grad():
                against = critic(real, *context) if recipe.loss in RELATIVISTIC else None
            return self._descend("generator", losses.generator_loss(recipe.loss, fake, against))
        finally:
            for p in self.trained["critic"]:
                p.requires_grad_(True)

    def _descend(self, side: str, loss: Tensor, what: str = "loss") -> float:
        """One step of the optimiser of ``side``, or an error before it where loss or gradient are not finite."""
        optimizer = self.optimizers[side]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained[side] if p.grad is not None]))
        if not math.isfinite(value) or not math.isfinite(norm):
            said = f"{what} is {value}" if not math.isfinite(value) else f"{what} has a gradient of norm {norm}"
            raise TrainingError(
                f"the {side}'s {said} at step {len(self.history) + 1}: lower the learning rate or raise the penalty's weight; "
                "the last checkpoint is kept"
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
        """``n`` samples of the averaged generator, the same latents for the same seed."""
        live, self.model.generator = self.model.generator, self.average
        try:
            return self.model.sample(n, generator=torch.Generator().manual_seed(seed))
        finally:
            self.model.generator = live

    # ---- checkpoints ----

    def weights(self) -> dict[str, Tensor]:
        """The model with the averaged generator: what samples are drawn from."""
        found = self.model.state_dict()
        return found | {f"generator.{k}": v for k, v in self.average.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside :meth:`weights`."""
        return {
            "step": len(self.history), "history": [tuple(h) for h in self.history], "critic_updates": self.critic_updates,
            "live": self.model.generator.state_dict(), "recipe": dataclasses.asdict(self.recipe),
            "optimizers": {side: o.state_dict() for side, o in self.optimizers.items()},
            "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
        }  # fmt: skip

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint as if there had been no stop.

        Raises:
            ValueError: the checkpoint's recipe is another.
        """
        state = torch.load(checkpoint / "training.pt", weights_only=True)
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise ValueError(f"train: {str(checkpoint)!r} was trained with {Recipe(**state['recipe'])}, not {self.recipe}")
        self.model.load_state_dict(load_file(checkpoint / "weights.safetensors"))
        self.average.load_state_dict(self.model.generator.state_dict())
        self.model.generator.load_state_dict(state["live"])
        self.history = [StepLosses(*h) for h in state["history"]]
        self.critic_updates = state["critic_updates"]
        for side, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][side])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


# ---- pictures ----


def draw_points(samples: Tensor, path: Path, *, real: Tensor | None = None, critic: nn.Module | None = None) -> None:
    """Points (N, 2) as a PNG: ``samples`` over ``real`` ones, over the contours of ``critic`` without labels.

    Raises:
        ValueError: points of another dimension than 2.
    """
    if samples.dim() != 2 or samples.shape[1] != 2:
        raise ValueError(f"draw_points: samples have shape {tuple(samples.shape)}, expected (N, 2)")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both = samples if real is None else torch.cat([samples.cpu(), real.cpu()])
    reach = min(10.0, max(0.5, 1.1 * float(both.abs().quantile(0.995)))) if len(both) else 1.0
    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    if critic is not None:
        line = torch.linspace(-reach, reach, 128)
        at = torch.cartesian_prod(line, line).to(samples.device)
        training_mode = critic.training
        with torch.no_grad():
            values = critic.eval()(at).reshape(128, 128).T.cpu()  # rows are the second coordinate
        critic.train(training_mode)
        axes.contour(line, line, values, levels=20, cmap="viridis", linewidths=0.7, alpha=0.8)
    if real is not None:
        axes.scatter(real[:, 0].cpu(), real[:, 1].cpu(), s=4, color="#d08a2e", label="data", linewidths=0)
    axes.scatter(samples[:, 0].cpu(), samples[:, 1].cpu(), s=4, color="#2a9d5c", label="samples", linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    if real is not None:
        axes.legend(loc="upper right")
    training.write_atomically(path, lambda p: figure.savefig(p, dpi=110))
    pyplot.close(figure)


def draw(samples: Tensor, path: Path, *, bins: int, real: Tensor | None = None, critic: nn.Module | None = None) -> None:
    """Samples (N, D) or (N, C, H, W) in [-1, 1] as a PNG: points, or a grid of images with ``bins`` levels."""
    if samples.dim() == 2:
        draw_points(samples, path, real=real, critic=critic)
    else:
        training.save_picture(training.image_grid(samples / 2, bins), path)


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


def train(
    name: str, data: Dataset | Points, out: str | Path, *, config: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None, steps: int | None = None, minutes: float | None = None, batch_size: int = 64,
    seed: int = 0, device: str = "cpu", resume: bool = False, save_every: int = 200, sample_every: int = 500,
    method: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Trains the adversarial model ``models.NAMES[name]`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``loss.png``, ``samples.png``, ``metrics.json``, and in ``progress/``
    the same latents drawn every so often. Checkpoints hold the averaged generator as the model and the rest beside it, so
    ``genfast sample`` and ``training.load_checkpoint`` read them. Ctrl-C writes a last checkpoint and then raises
    KeyboardInterrupt.

    Args:
        config: of the model, beside what the data decide.
        recipe: fields of :class:`genfast.models.Recipe` that replace the model's own.
        steps, minutes: whichever ends first; 1000 steps without either. A step is one update of the generator.
        out: the folder.
        resume: goes on from the newest checkpoint there, with the recipe it was trained with.
        sample_every: steps between two pictures; 0 for none on the way.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        ValueError: model, data and recipe that do not fit each other or the checkpoint.
        TrainingError: a loss or a gradient is not finite.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    training.check_folder(out, resume)
    torch.manual_seed(seed)
    checkpoint = None
    found = _config(name, data, config or {})
    if resume and training._steps(out):
        model, metadata, checkpoint = training.load_checkpoint(out)
        if metadata["model"] != name:
            raise ValueError(f"train: {str(out)!r} holds a {metadata['model']}, not a {name}")
    else:
        model = models.build(name, **found)
    chosen = dataclasses.replace(model.recipe, **(recipe or {}))
    if checkpoint is not None and not recipe:
        chosen = Recipe(**torch.load(checkpoint / "training.pt", weights_only=True)["recipe"])
    trainer = AdversarialTrainer(model, data, recipe=chosen, batch_size=batch_size, seed=seed, device=device, method=method)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    began = saved = len(trainer.history)
    test = data.test[:2000] if isinstance(data, Points) else None
    contours = model.critic if model.classes is None else None

    def picture(path: Path) -> None:
        if isinstance(data, Dataset) or data.shape == (2,):
            draw(trainer.sample(64 if test is None else 2000), path, bins=data.bins, real=test, critic=contours)

    def save() -> None:
        nonlocal saved
        if len(trainer.history) > saved or checkpoint is None:
            training.save_checkpoint(out, name, model, trainer.state(), data.bins, trainer.weights())
            saved = len(trainer.history)

    def step() -> str:
        at = trainer.step()
        return f"critic {at.critic:.3f}, generator {at.generator:.3f}"

    def every() -> None:
        if sample_every and len(trainer.history) % sample_every == 0:
            picture(out / "progress" / f"step-{len(trainer.history):07d}.png")

    seconds = training.loop(
        step, lambda: len(trainer.history), save, out, title=f"{name} on {data.name}", steps=steps, minutes=minutes,
        save_every=save_every, every=every,
    )  # fmt: skip
    picture(out / "samples.png")
    curves = {side: [getattr(h, side) for h in trainer.history] for side in ("critic", "generator")}
    training.plot_losses(curves, out / "loss.png", ylabel="loss")
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
    text = json.dumps(written, indent=2) + "\n"
    training.write_text(out / "metrics.json", text)
    read: dict[str, Any] = json.loads(text)
    return read
