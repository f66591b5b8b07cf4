"""Training autoencoders, variational and adversarial ones too: runs that resume bit by bit, and pictures of how it went."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import losses, models
from .._modes import evaluating
from ..models import AutoencoderModel
from . import checkpoints, distributed, pictures
from . import trainer as training
from .data import Dataset
from .trainer import TrainingError

IMPORTANCE_SAMPLES = 64
DIVERGED = 100  # times a figure's first value, or the numbers in an image: a nat for each of them


class AutoencoderTrainer:
    """One autoencoder on one set of images; repeats exactly from a seed or a checkpoint.

    A step runs the model's phases in order on one batch: the losses of a phase's players from one pass, then an Adam step for
    each of them.

    On several ranks (see :mod:`genfast.distributed`) all are made and stepped together, and take the steps of one, but where a
    loss couples the images of a batch: the discrepancy of a WAE and the KL of mean activations see a rank's portion.

    Args:
        batch_size: over all ranks; at most the training set.
        lr: of every player.
        seed: of batches, noise and corruption.
        clip: the largest norm of a player's gradient.

    Raises:
        ValueError: a model and data that do not fit, a batch size below 1, or fewer images in a batch than ranks.

    Example:
        >>> from genfast import data, models, training
        >>> digits = data.load("digits")
        >>> model = models.VAE(digits.shape, levels=digits.bins, hidden=8)
        >>> training.AutoencoderTrainer(model, digits).step()["kl"] >= 0
        True
    """

    def __init__(
        self, model: AutoencoderModel, data: Dataset, *, batch_size: int = 64, lr: float = 1e-3, seed: int = 0,
        device: str = "cpu", clip: float = 1000.0,
    ) -> None:  # fmt: skip
        distributed.check_device(device)
        if batch_size < 1:
            raise ValueError(f"train: batch_size={batch_size}, expected at least 1")
        if model.shape != data.shape:
            raise ValueError(f"train: the model takes {model.shape} and the data are {data.shape}")
        if model.levels != data.bins:
            raise ValueError(f"train: the model has levels={model.levels} and the data have {data.bins}")
        self.model, self.data, self.clip = model.to(device), data, clip
        self.batch_size = distributed.check_batch(min(batch_size, len(data.train)))
        self.weight = distributed.weight(self.batch_size)
        distributed.share([*model.parameters(), *model.buffers()])
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        players = dict.fromkeys(player for phase in model.phases for player in phase)
        self.players = {name: list(model.player(name)) for name in players}
        self.optimizers = {name: torch.optim.Adam(p, lr=lr, betas=model.betas, fused=True) for name, p in self.players.items()}
        self.history: list[dict[str, float]] = []

    def batch(self) -> Tensor:
        """The next batch of whole numbers, over all ranks."""
        index = torch.randint(len(self.data.train), (self.batch_size,), generator=self.generator)
        return self.data.train[index]

    def step(self) -> dict[str, float]:
        """One step of all players; returns the model's figures by name, "loss" or the like.

        Raises:
            TrainingError: a loss or a gradient is not finite, on all ranks together; the weights are those before the phase.
        """
        if distributed.size() > 1:  # one process goes on with the numbers that torch draws
            distributed.seed(self.seed, len(self.history))
        if not self.model.training:  # parts that their owner has frozen by eval stay frozen
            self.model.train()
        found: dict[str, float] = {}
        images = self.batch()[distributed.portion(self.batch_size)]
        for phase in self.model.phases:
            with distributed.drawn_for_all(self.batch_size, self.generator):
                given = self.model.losses(phase, images, generator=self.generator, step=len(self.history))
            for name in phase:
                self._differentiate(name, given.players[name], last=name == phase[-1])
            for name in phase:
                self.optimizers[name].step()
            found |= dict(zip(given.figures, self._means(given.figures.values())))
        self.history.append(found)
        return found

    def _means(self, shares: Iterable[Tensor]) -> list[float]:
        """Of this rank's means, those of the whole batch."""
        sums = distributed.total(*(float(s.detach()) * self.weight for s in shares))
        return [s / distributed.size() for s in sums]

    def _differentiate(self, name: str, loss: Tensor, last: bool) -> None:
        """Leaves the player's gradient of its loss in ``grad``, or raises where it is not finite."""
        parameters = self.players[name]
        found = torch.autograd.grad(loss * self.weight, parameters, retain_graph=not last, allow_unused=True)
        for p, g in zip(parameters, found):
            p.grad = g
        # Several losses of one pass, each for parameters of its own: not what DistributedDataParallel can be told.
        distributed.average([g for g in found if g is not None])
        value, norm = self._means([loss])[0], float(torch.nn.utils.clip_grad_norm_(parameters, self.clip))
        if not math.isfinite(value) or not math.isfinite(norm):
            said = f"loss is {value}" if not math.isfinite(value) else f"loss has a gradient of norm {norm}"
            raise TrainingError(f"the {name}'s {said} at step {len(self.history) + 1}: lower the learning rate")

    @torch.no_grad()
    def evaluate(self, limit: int = 1024) -> dict[str, float]:
        """The model's figures on the test images, means, with noise from a fixed seed; of a VAE the bounds in bits too.

        Ranks share the bound of many samples; the rest, some of which couples images, each of them computes whole.
        """
        with evaluating(self.model):
            return self._evaluated(limit)

    def _evaluated(self, limit: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)
        images = self.data.test[:limit]
        parts = [self.model.figures(b, generator=generator) for b in images.split(256)]
        found = {name: float(torch.cat([p[name] for p in parts]).double().mean()) for name in parts[0]}
        if isinstance(self.model, models.VAE):
            bounds = []
            for b in images.split(256):
                part = b[distributed.portion(len(b))]
                with distributed.drawn_for_all(len(b), generator):
                    bound = self.model.importance_weighted_bound(part, IMPORTANCE_SAMPLES, generator=generator)
                bounds += [bound * len(part)] if len(part) else []
            whole = distributed.total(float(torch.stack(bounds).double().sum()) if bounds else 0.0)[0]
            found["importance_weighted_bound"] = whole / len(images)
            found["bits_per_dim"] = losses.bits_per_dim(found["elbo"], self.model.dim)
            found["importance_weighted_bits_per_dim"] = losses.bits_per_dim(found["importance_weighted_bound"], self.model.dim)
        return found

    def diverged(self, held_out: dict[str, Any] | None = None) -> str | None:
        """What to say of a run with a figure far above what it began with, in its last steps or on ``held_out`` images."""
        if not self.history:
            return None
        recent = self.history[-training.RECENT :]
        for name, first in self.history[0].items():
            value = abs(statistics.median(h[name] for h in recent) if held_out is None else held_out.get(f"test_{name}", 0.0))
            if not value <= DIVERGED * max(self.model.dim, abs(first)):
                where = f"after {len(self.history)} steps" if held_out is None else "on held-out images"
                return (
                    f"the run diverged: {name} is {value:.4g} {where}, {first:.4g} at its first step: lower the learning rate"
                )
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights to sample from; see :func:`genfast.checkpoints.save`."""
        return {
            "step": len(self.history), "history": self.history, "model": self.model.state_dict(),
            "optimizers": {name: checkpoints.optimizer_state(self.model, o) for name, o in self.optimizers.items()},
            "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
        }  # fmt: skip

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint, of any number of ranks, as if there had been no stop."""
        state = self.state()
        checkpoints.restore(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.history = [dict(h) for h in state["history"]]
        for name, optimizer in self.optimizers.items():
            checkpoints.set_optimizer_state(self.model, optimizer, state["optimizers"][name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


# ---- the loop ----


def _config(name: str, data: Dataset, config: dict[str, Any]) -> dict[str, Any]:
    """The model's config with what the data decide."""
    if not issubclass(models.NAMES.get(name, object), AutoencoderModel):
        known = [k for k, v in models.NAMES.items() if issubclass(v, AutoencoderModel)]
        raise ValueError(f"train: {name!r} is no autoencoder, expected one of {', '.join(known)}")
    if not isinstance(data, Dataset):
        raise ValueError(f"train: {name} takes images, and {data.name} are points")
    found: dict[str, Any] = {"shape": data.shape, "levels": data.bins}
    if data.shape[1] < 16:
        found["base"] = 2  # so that 8 x 8 images have two stages
    unknown = [k for k in config if k not in inspect.signature(models.NAMES[name]).parameters]
    if unknown:
        raise ValueError(f"train: {name} takes no {', '.join(unknown)}")
    return found | config


@checkpoints.holding_folder
def train(
    name: str, data: Dataset, out: str | Path, *, config: dict[str, Any] | None = None, steps: int | None = None,
    minutes: float | None = None, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, device: str = "cpu",
    resume: bool = False, save_every: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Trains the autoencoder ``models.NAMES[name]`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``log.csv``, ``loss.png``, ``samples.png``, ``reconstructions.png``
    of held-out images, ``latent.png`` where the latent space is a plane with a prior, and ``metrics.json``: among others the
    held-out figures of the model, of a VAE the evidence lower bound in nats and in bits per dimension, its two parts, and the
    bound of 64 importance-weighted samples. Ctrl-C and SIGTERM write a last checkpoint and then raise KeyboardInterrupt. A
    picture that cannot be drawn is a line on standard error.

    Args:
        config: of the model, beside what the data decide.
        steps, minutes: whichever ends first; 1000 steps without either.
        out: the folder.
        batch_size: over all ranks.
        resume: goes on from the newest checkpoint there.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is no checkpoint, or it lacks a file.
        BlockingIOError: another process trains in ``out``.
        ValueError: model and data that do not fit each other or the checkpoint, or a checkpoint that is damaged.
        ImportError: matplotlib, which draws the curves, is not installed.
        TrainingError: a loss or a gradient is not finite, or a loss is far above what it began with.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    training.check_plots()
    training.check_length(steps, minutes)
    torch.manual_seed(seed)
    model, checkpoint = checkpoints.begin(out, name, resume, _config(name, data, config or {}))
    trainer = AutoencoderTrainer(model, data, batch_size=batch_size, lr=lr, seed=seed, device=device)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    began = len(trainer.history)

    def save() -> None:
        with evaluating(model):
            model.fit(data.train[:10_000])
        checkpoints.save(out, name, model, trainer.state(), data.bins)

    seconds = training.loop(
        trainer.step, lambda: len(trainer.history), save, out, title=f"{name} on {data.name}", steps=steps, minutes=minutes,
        save_every=save_every, diverged=trainer.diverged,
    )  # fmt: skip
    model.eval()
    names = list(trainer.history[0]) if trainer.history else []
    tail = trainer.history[-50:]
    written: dict[str, Any] = {
        "model": name, "data": data.name, "steps": len(trainer.history),
        "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds,
        "steps_per_second": (len(trainer.history) - began) / seconds if seconds else 0.0,
    }  # fmt: skip
    if isinstance(model, models.VAE):
        written["likelihood"] = model.likelihood
    written |= {f"train_{k}": sum(h[k] for h in tail) / len(tail) for k in names}
    written |= {f"test_{k}": v for k, v in trainer.evaluate().items()}

    def samples(path: Path) -> None:
        drawn = distributed.sample(model, 64, generator=torch.Generator().manual_seed(seed))
        if distributed.first():
            pictures.save_picture(pictures.image_grid(drawn, data.bins), path)

    def curves(path: Path) -> None:
        if distributed.first():
            pictures.plot_losses({k: [h[k] for h in trainer.history] for k in names}, path, ylabel="nats or squared error")

    def reconstructions(path: Path) -> None:
        if distributed.first():
            pictures.save_picture(pictures.reconstruction_grid(model, data.test[:32]), path)

    def latent(path: Path) -> None:
        if distributed.first():
            pictures.save_picture(pictures.latent_grid(model), path)

    drawings = {"loss.png": curves, "samples.png": samples, "reconstructions.png": reconstructions}
    if model.latent_dim == 2 and model.prior:
        drawings["latent.png"] = latent
    training.write_results(written, drawings, out)
    said = trainer.diverged(written)
    if said is not None:
        raise TrainingError(f"{said}; see {out}")
    return written
