"""Training a model of images: a loop with progress, checkpoints that a crash cannot tear, and pictures of how it went."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _signals, models
from .._files import write_text
from .._modes import evaluating
from ..models import AutoregressiveModel
from ..programs import LoweringError
from . import checkpoints, distributed
from .data import Dataset
from .pictures import image_grid, plot_losses, save_picture

latest, load_checkpoint = checkpoints.latest, checkpoints.load
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
Model = models.DensityModel | AutoregressiveModel
DIVERGED = 10  # times the loss of guessing, or of the first step
RECENT = 50  # steps over which a loss is judged
SPEAK = 30.0  # seconds between two lines off a terminal


class TrainingError(RuntimeError):
    """Training cannot go on: a run that diverges. Checkpoints that it has written stay."""


# ---- what a run leaves behind ----


def check_plots() -> None:
    """Raises ImportError where the curves of a run could not be drawn at its end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("train: the curves of a run need matplotlib: pip install matplotlib") from error


def write_results(metrics: dict[str, Any], pictures: Mapping[str, Callable[[Path], object]], out: Path) -> None:
    """Writes metrics.json, then each picture under its name; all ranks call this together, and rank 0 writes.

    A picture that fails is a line on standard error and not the run's end. Numbers that are not finite become null, since JSON
    has no others.
    """
    if distributed.first():
        write_text(out / "metrics.json", json.dumps(_finite(metrics), indent=2, allow_nan=False) + "\n")
    for name, draw in pictures.items():
        attempt(draw, out / name)


def attempt(draw: Callable[[Path], object], path: Path) -> None:
    """Draws a picture of a run, or says on standard error why there is none: whatever fails is less than the run's weights."""
    try:
        draw(path)
    except Exception as error:
        if distributed.first():
            print(f"genfast: {path} was not drawn: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the loop ----


class Trainer:
    """One model on one data set: batches, noise and updates that repeat exactly from a seed or a checkpoint.

    On several ranks (see :mod:`genfast.distributed`) all are made and stepped together, and take the steps of one.

    Args:
        batch_size: over all ranks; at most the training set.
        seed: of batches and noise.
        clip: the largest norm of the gradient.
        parallel: a strategy of :func:`genfast.distributed.parallel`. With "fsdp" the parameters of ``model`` become shards.

    Raises:
        ValueError: model and data that do not fit, fewer images in a batch than ranks, or a strategy that cannot be.

    Example:
        >>> from genfast import data, models, training
        >>> digits = data.load("digits")
        >>> trainer = training.Trainer(models.Glow(digits.shape, levels=1, steps=1, hidden=4), digits)
        >>> trainer.step() > 0
        True
    """

    def __init__(
        self, model: Model, data: Dataset, *, batch_size: int = 64, lr: float = 1e-3, seed: int = 0,
        device: str = "cpu", clip: float = 50.0, parallel: str = "ddp",
    ) -> None:  # fmt: skip
        distributed.check_strategy(parallel)
        distributed.check_device(device)
        if batch_size < 1:
            raise ValueError(f"train: batch_size={batch_size}, expected at least 1")
        if model.shape != data.shape:
            raise ValueError(f"train: the model takes {model.shape} and the data are {data.shape}")
        if isinstance(model, AutoregressiveModel) and model.levels != data.bins:
            raise ValueError(f"train: the model has levels={model.levels} and the data have {data.bins}")
        self.model, self.data, self.device, self.clip = model.to(device), data, device, clip
        self.batch_size = distributed.check_batch(min(batch_size, len(data.train)))
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        if distributed.size() > 1 or parallel == "fsdp":
            self._initialize()
        objective = distributed.Objective(model, lambda x: self._bits(model, x).mean() * distributed.weight(self.batch_size))
        self.objective = distributed.parallel(objective, parallel)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.losses: list[float] = []

    @torch.no_grad()
    def _initialize(self) -> None:
        """Sets what is set from the first batch, as the first step would: wrapped, a model's weights are not its own to set."""
        if any(getattr(m, "_pending", False) for m in self.model.modules()):
            before = self.generator.get_state()
            distributed.seed(self.seed)
            self._to_training()
            self._bits(self.model, self._portion(self.batch(), self.generator))
            self.generator.set_state(before)

    def _to_training(self) -> None:
        """Puts the model into training mode, unless it is: parts that its owner has frozen by ``eval`` stay frozen."""
        if not self.model.training:
            self.objective.train()

    def batch(self) -> Tensor:
        """The next batch of whole numbers, over all ranks."""
        index = torch.randint(len(self.data.train), (self.batch_size,), generator=self.generator)
        return self.data.train[index]

    def _portion(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """This rank's part of a batch (N, *shape) in [0, bins), as the model takes it; a flow's with noise drawn for all."""
        part = distributed.portion(len(images))
        if isinstance(self.model, AutoregressiveModel):
            return images[part].to(self.device)
        x = models.dequantize(images, self.data.bins, generator=generator)[part]
        return x.to(next(self.model.parameters()))

    def _bits(self, model: Model, x: Tensor) -> Tensor:
        if isinstance(model, AutoregressiveModel):
            return model.bits_per_dim(x)
        bits: Tensor = (math.log(self.data.bins) - model.log_prob(x) / model.dim) / math.log(2)
        return bits

    def step(self) -> float:
        """One update; returns the loss in bits per dimension, over all ranks.

        Raises:
            TrainingError: the loss or its gradient is not finite, on all ranks together.
        """
        if distributed.size() > 1:  # one process goes on with the numbers that torch draws
            distributed.seed(self.seed, len(self.losses))
        self._to_training()
        loss = self.objective(self._portion(self.batch(), self.generator))
        self.optimizer.zero_grad()
        loss.backward()
        value = distributed.total(float(loss.detach()))[0] / distributed.size()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {len(self.losses) + 1}: lower the learning rate")
        total = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
        if not math.isfinite(norm):
            raise TrainingError(
                f"the loss has a gradient of norm {norm} at step {len(self.losses) + 1}: lower the learning rate"
            )
        self.optimizer.step()
        self.losses.append(value)
        return value

    @torch.no_grad()
    def evaluate(self, limit: int = 1024) -> float:
        """Bits per dimension on the test images, split over the ranks, with noise from a fixed seed."""
        with evaluating(self.model):
            model, generator = distributed.whole(self.model), torch.Generator().manual_seed(1)
            batches = self.data.test[:limit].split(256)
            parts = [distributed.gather(self._bits(model, self._portion(b, generator))) for b in batches]
        return float(torch.cat(parts).double().mean())

    def diverged(self, bits: float | None = None) -> str | None:
        """What to say of a run that is worse than guessing by far, judged by its last steps or by ``bits`` per dimension."""
        if not self.losses:
            return None
        bound = DIVERGED * max(self.losses[0], math.log2(self.data.bins))
        value = statistics.median(self.losses[-RECENT:]) if bits is None else bits
        if value <= bound:  # which nan is not
            return None
        where = f"after {len(self.losses)} steps" if bits is None else "on held-out images"
        return (
            f"the run diverged: {value:.4g} bits/dim {where}, {self.losses[0]:.4g} at its first step: lower the learning rate"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights to sample from; see :func:`genfast.checkpoints.save`."""
        return {
            "step": len(self.losses), "losses": self.losses, "model": self.model.state_dict(),
            "optimizer": checkpoints.optimizer_state(self.model, self.optimizer),
            "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
        }  # fmt: skip

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint, of any number of ranks, as if there had been no stop."""
        state = self.state()
        checkpoints.restore(checkpoint, state)
        self.model.load_state_dict(state["model"])
        self.losses = list(state["losses"])
        checkpoints.set_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])


def draw(model: models.AutoregressiveModel, n: int, *, generator: torch.Generator, **options: Any) -> Tensor:
    """Samples on all ranks, by the cached engine where the model has a pixel program, else by the standard loop."""
    try:
        return distributed.sample(model, n, generator=generator, **{"method": "cached", **options})
    except LoweringError:
        return distributed.sample(model, n, generator=generator, **{**options, "method": "naive"})


def _fitted(name: str, data: Dataset) -> tuple[Dataset, dict[str, Any]]:
    """The data as the model ``name`` takes them, and what of its config they decide."""
    model = models.NAMES.get(name)
    if name in ("iaf", "linear_flow", "maf", "nice", "nsf", "rnade"):
        view = Dataset(data.name, data.train.flatten(1), data.test.flatten(1), data.bins)
        return view, {"dim": math.prod(data.shape)}
    if model is None or not issubclass(model, AutoregressiveModel):
        return data, {"shape": data.shape}
    if model.dims == 0:
        view = Dataset(data.name, data.train.flatten(1), data.test.flatten(1), data.bins)
        return view, {"dim": math.prod(data.shape), "levels": data.bins}
    if model.dims == 2:
        return data, {"in_channels": data.shape[0], "levels": data.bins, "shape": data.shape}
    if data.shape[0] != 1:
        raise ValueError(f"train: {name} takes sequences of one channel, the data have shape {data.shape}")
    view = Dataset(data.name, data.train.flatten(2), data.test.flatten(2), data.bins)
    return view, {"levels": data.bins, "shape": view.shape}


class _Log:
    """log.csv: step, seconds of training and the figures of each step, in whole rows that are appended together.

    A run that goes on keeps the rows of its own steps.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step, self.names, self.rows = path, step, "", [""]
        self.seconds, self.start = 0.0, time.monotonic()
        if step and path.is_file():
            self._take(path.read_text(encoding="utf-8").split("\n"))

    def _take(self, lines: list[str]) -> None:
        self.names = lines[0]
        rows = [line for line in lines[1:-1] if line.count(",") == self.names.count(",") and line.split(",")[0].isdecimal()]
        rows = [row for row in rows if int(row.split(",")[0]) <= self.step]
        if rows:
            self.seconds = float(rows[-1].split(",")[1])
        self.rows = [self.names, *rows, ""]

    def add(self, step: int, figures: dict[str, float]) -> None:
        names = ",".join(("step", "seconds", *figures))
        if names != self.names:  # a run that begins, or one of another version
            self.names, self.rows = names, [names, ""]
            self.step = 0
        seconds = self.seconds + time.monotonic() - self.start
        self.rows[-1:] = [",".join((str(step), f"{seconds:.3f}", *(f"{v:.8g}" for v in figures.values()))), ""]

    def write(self) -> None:
        """Appends what has been added since the last time."""
        text = "\n".join(self.rows)
        if self.rows[0] == self.names and text:
            write_text(self.path, text)
        elif text:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self.rows = [""]


def loop(
    step: Callable[[], dict[str, float]], done: Callable[[], int], save: Callable[[], object], out: Path, *, title: str,
    steps: int | None, minutes: float | None, save_every: int, every: Callable[[], None] | None = None,
    diverged: Callable[[], str | None] = lambda: None,
) -> float:  # fmt: skip
    """Calls ``step``, which returns its figures, until ``done`` is ``steps`` or the minutes are over; returns the seconds.

    1000 steps without either. Saves every ``save_every`` steps and at the end, no step twice; calls ``every`` after each step.
    Off a terminal there is a line on standard error every half minute in the place of the bar; log.csv has all figures.
    Ctrl-C and SIGTERM let the step end, save, and then raise KeyboardInterrupt (:class:`genfast._signals.Terminated` is one);
    pressed twice they do so at once. Ranks stop after the same step: whichever is asked to, or is the first out of time.

    Raises:
        ValueError: fewer than one step, or no time.
        TrainingError: a step's, or of ``diverged``, which is asked before each checkpoint, with what has been saved.
    """
    from tqdm import tqdm

    check_length(steps, minutes)
    if steps is None and minutes is None:
        steps = 1000
    start, saved = time.monotonic(), done()  # a run that goes on has its checkpoint
    first = distributed.first()
    log = _Log(out / "log.csv", done()) if first else None
    began, spoken = done(), start

    def keep() -> None:
        nonlocal saved
        if done() != saved or not saved:
            said = diverged()
            if said is not None:
                raise TrainingError(said)
            save()
            saved = done()
        if log is not None:
            log.write()

    def stop_if_asked() -> None:
        pressed, ended = signalled.signum is not None, signalled.signum not in (None, signal.SIGINT)
        stop, terminated = distributed.total(pressed, ended)
        if stop:
            raise _signals.interruption(signalled.signum or (signal.SIGTERM if terminated else signal.SIGINT))

    def late() -> bool:
        return bool(distributed.total(minutes is not None and time.monotonic() - start >= 60 * minutes)[0])

    terminal = first and sys.stderr.isatty()
    bar = tqdm(total=steps, initial=done(), unit="step", disable=not terminal, desc=title)
    with _signals.deferred() as signalled:
        try:
            try:
                while (steps is None or done() < steps) and not late():
                    stop_if_asked()
                    figures = step()
                    text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
                    bar.set_postfix_str(text, refresh=False)
                    bar.update()
                    if log is not None:
                        log.add(done(), figures)
                        if time.monotonic() - spoken >= SPEAK:
                            spoken = time.monotonic()
                            log.write()
                            if not terminal:
                                of, rate = "" if steps is None else f" of {steps}", (done() - began) / (spoken - start)
                                print(f"{title}: step {done()}{of}, {text}, {rate:.2f} steps/s", file=sys.stderr, flush=True)
                    if done() % save_every == 0:
                        keep()
                    if every is not None:
                        every()
                keep()
                stop_if_asked()
            except KeyboardInterrupt as error:
                keep()
                said = f"stopped at step {done()}; checkpoint kept in {out}"
                raise _signals.interruption(getattr(error, "signum", signal.SIGINT), said) from None
        except (TrainingError, FloatingPointError, LinAlgError) as error:
            said = " ".join(str(error).split())
            if not isinstance(error, TrainingError):
                said = f"step {done() + 1} has no result: {said}: lower the learning rate"
            if log is not None:
                log.write()
            kept = f"checkpoint-{saved} is kept in {out}" if saved else "there is no checkpoint from before"
            raise TrainingError(f"{said}; {kept}") from error
        finally:
            bar.close()
    return time.monotonic() - start


def check_length(steps: int | None, minutes: float | None) -> None:
    """Raises ValueError for a run of no steps or no time."""
    if steps is not None and steps < 1:
        raise ValueError(f"train: steps={steps}, expected at least 1")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"train: minutes={minutes}, expected a positive number")


@checkpoints.holding_folder
def train(
    name: str, data: Dataset, out: str | Path, *, config: dict[str, Any] | None = None, steps: int | None = None,
    minutes: float | None = None, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, device: str = "cpu",
    resume: bool = False, save_every: int = 200, parallel: str = "ddp",
) -> dict[str, Any]:  # fmt: skip
    """Trains ``models.NAMES[name]`` on ``data`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``log.csv``, ``loss.png``, ``samples.png`` and ``metrics.json``.
    Ctrl-C and SIGTERM write a last checkpoint and then raise KeyboardInterrupt; ``resume`` goes on from the newest one. A
    picture that cannot be drawn is a line on standard error.

    Args:
        config: of the model, beside its shape.
        steps, minutes: whichever ends first; 1000 steps without either.
        out: the folder.
        batch_size: over all ranks.
        parallel: how ranks share the work, "ddp" or "fsdp"; see :func:`genfast.distributed.parallel`.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is no checkpoint, or it lacks a file.
        BlockingIOError: another process trains in ``out``.
        ValueError: model, data and checkpoint that do not fit each other, or a checkpoint that is damaged.
        ImportError: matplotlib, which draws the curve, is not installed.
        TrainingError: the loss is not finite, or far above what it began with.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    check_plots()
    check_length(steps, minutes)
    if issubclass(models.NAMES.get(name, models.FlowModel), models.AdversarialModel):
        raise ValueError(f"train: {name} is adversarial; train it with genfast.training.train_adversarial")
    if issubclass(models.NAMES.get(name, models.FlowModel), models.AutoencoderModel):
        raise ValueError(f"train: {name} is an autoencoder; train it with genfast.training.train_autoencoder")
    if not isinstance(data, Dataset):
        raise ValueError(f"train: {name} takes images, and {data.name} are points")
    torch.manual_seed(seed)
    view, shape = _fitted(name, data)
    model, checkpoint = checkpoints.begin(out, name, resume, shape | (config or {}))
    trainer = Trainer(model, view, batch_size=batch_size, lr=lr, seed=seed, device=device, parallel=parallel)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    began = len(trainer.losses)
    seconds = loop(
        lambda: {"bits_per_dim": trainer.step()}, lambda: len(trainer.losses),
        lambda: checkpoints.save(out, name, model, trainer.state(), data.bins), out, title=f"{name} on {data.name}",
        steps=steps, minutes=minutes, save_every=save_every, diverged=trainer.diverged,
    )  # fmt: skip
    metrics = {
        "model": name, "data": data.name, "steps": len(trainer.losses),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_bits_per_dim": sum(trainer.losses[-50:]) / max(1, len(trainer.losses[-50:])),
        "test_bits_per_dim": trainer.evaluate(), "seconds": seconds,
        "steps_per_second": (len(trainer.losses) - began) / seconds if seconds else 0.0,
    }  # fmt: skip
    plain = distributed.whole(model.eval())

    def samples(path: Path) -> None:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(plain, models.AutoregressiveModel):
            drawn = draw(plain, 64, generator=generator)
        else:
            drawn = distributed.sample(plain, 64, generator=generator, temperature=0.8)
        if distributed.first():
            save_picture(image_grid(drawn.reshape(-1, *data.shape), data.bins), path)

    def curve(path: Path) -> None:
        if distributed.first():
            plot_losses({"train": trainer.losses}, path)

    write_results(metrics, {"loss.png": curve, "samples.png": samples}, out)
    said = trainer.diverged(metrics["test_bits_per_dim"])
    if said is not None:
        raise TrainingError(f"{said}; see {out}")
    return metrics
