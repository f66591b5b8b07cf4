"""Runs: a loop with progress, checkpoints that a crash cannot tear, and a folder with pictures of how it went."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _signals, models
from .._files import write_text
from .._modes import evaluating
from ..models import AdversarialModel, AutoencoderModel, AutoregressiveModel
from ..programs import LoweringError
from . import checkpoints, distributed, metrics, pictures
from .data import Dataset, Points
from .trainer import Trainer, TrainingError, checkpoint_recipe

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
SPEAK = 30.0  # seconds between two lines off a terminal
VECTORS = ("iaf", "linear_flow", "maf", "nice", "nsf", "rnade")  # flows that take an image as a vector
SIDES = ("critic", "generator")


# ---- what a model and its data decide together ----


def decided(model: type) -> tuple[str, ...]:
    """Parameters of a model's constructor that a run takes from its data, which have no conditions."""
    names = ("shape", "dim", "in_channels", "context", "context_channels", "context_features")
    if issubclass(model, models.ConditionalGAN):
        return (*names, "classes")
    return (*names, "levels") if issubclass(model, AutoregressiveModel | AutoencoderModel) else names


def fitted(name: str, data: Dataset | Points, config: dict[str, Any]) -> tuple[Dataset | Points, dict[str, Any]]:
    """The data as the model ``name`` takes them, and its config with what they decide.

    Raises:
        ValueError: an unknown model, data that it does not take, or a config that it does not have.
    """
    if name not in models.NAMES:
        raise ValueError(f"train: name={name!r}, expected one of {', '.join(map(repr, models.NAMES))}")
    model = models.NAMES[name]
    parameters = inspect.signature(model).parameters
    unknown = [key for key in config if key not in parameters]
    if unknown:
        raise ValueError(f"train: {name} takes no {', '.join(unknown)}")
    if isinstance(data, Points) and not issubclass(model, AdversarialModel):
        raise ValueError(f"train: {name} takes images, and {data.name} are points")
    decided: dict[str, Any] = {}
    if "base" in parameters and len(data.shape) == 3 and data.shape[1] < 16:
        decided["base"] = 2  # so that 8 x 8 images have two stages
    if name == "cgan":
        if data.train_labels is None:
            raise ValueError(f"train: cgan needs labels, and {data.name} has none")
        decided["classes"] = int(data.train_labels.max()) + 1
    if issubclass(model, AutoregressiveModel | AutoencoderModel):
        decided["levels"] = data.bins
    if issubclass(model, AutoregressiveModel) and model.dims == 2:
        decided["in_channels"] = data.shape[0]
    dims = model.dims if issubclass(model, AutoregressiveModel) else 0 if name in VECTORS else 2
    if dims == 1 and data.shape[0] != 1:
        raise ValueError(f"train: {name} takes sequences of one channel, the data have shape {data.shape}")
    if dims < 2:
        data = Dataset(data.name, data.train.flatten(1 + dims), data.test.flatten(1 + dims), data.bins)
    return data, decided | ({"shape": data.shape} if dims else {"dim": data.shape[0]}) | config


# ---- the loop ----


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
        rows = [
            line for line in lines[1:-1] if line.count(",") == self.names.count(",") and line.split(",")[0].isdecimal()
        ]
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
    step: Callable[[], dict[str, float]],
    done: Callable[[], int],
    save: Callable[[], object],
    out: Path,
    *,
    title: str,
    steps: int | None,
    minutes: float | None,
    save_every: int,
    every: Callable[[], None] | None = None,
    diverged: Callable[[], str | None] = lambda: None,
) -> float:
    """Calls ``step``, which returns its figures, until ``done`` is ``steps`` or the minutes are over; returns the
    seconds.

    1000 steps without either. Saves every ``save_every`` steps and at the end, no step twice; calls ``every`` after
    each step. Off a terminal there is a line on standard error every half minute in the place of the bar; log.csv has
    all figures. Ctrl-C and SIGTERM let the step end, save, and then raise KeyboardInterrupt
    (:class:`genfast._signals.Terminated` is one); pressed twice they do so at once. Ranks stop after the same step:
    whichever is asked to, or is the first out of time.

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
                                print(
                                    f"{title}: step {done()}{of}, {text}, {rate:.2f} steps/s",
                                    file=sys.stderr,
                                    flush=True,
                                )
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


# ---- what a run leaves behind ----


def check_plots() -> None:
    """Raises ImportError where the curves of a run could not be drawn at its end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("train: the curves of a run need matplotlib: pip install matplotlib") from error


def write_results(metrics: dict[str, Any], pictures: Mapping[str, Callable[[Path], object]], out: Path) -> None:
    """Writes metrics.json, then each picture under its name; all ranks call this together, and rank 0 writes.

    A picture that fails is a line on standard error and not the run's end. Numbers that are not finite become null,
    since JSON has no others.
    """
    if distributed.first():
        write_text(out / "metrics.json", json.dumps(_finite(metrics), indent=2, allow_nan=False) + "\n")
    for name, draw in pictures.items():
        attempt(draw, out / name)


def attempt(draw: Callable[[Path], object], path: Path) -> None:
    """Draws a picture of a run, or says on standard error why there is none: whatever fails is less than the run's
    weights."""
    try:
        draw(path)
    except Exception as error:
        if distributed.first():
            print(
                f"genfast: {path} was not drawn: {' '.join(str(error).split()) or type(error).__name__}",
                file=sys.stderr,
            )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(model: models.AutoregressiveModel, n: int, *, generator: torch.Generator, **options: Any) -> Tensor:
    """Samples on all ranks, by the cached engine where the model has a pixel program, else by the standard loop."""
    try:
        return distributed.sample(model, n, generator=generator, **{"method": "cached", **options})
    except LoweringError:
        return distributed.sample(model, n, generator=generator, **{**options, "method": "naive"})


def _draw_samples(trainer: Trainer, data: Dataset | Points, seed: int, path: Path) -> None:
    """Samples as a picture; all ranks call this together, and rank 0 writes."""
    model = trainer.model
    if isinstance(model, AdversarialModel):
        if isinstance(data, Dataset) or data.shape == (2,):
            real = None if isinstance(data, Dataset) else data.test[:2000]
            drawn = trainer.sample(64 if real is None else 2000)
            if distributed.first():
                critic = model.critic if model.classes is None else None
                pictures.draw(drawn, path, bins=data.bins, real=real, critic=critic)
        return
    whole, generator = distributed.whole(model), torch.Generator().manual_seed(seed)
    if isinstance(model, AutoregressiveModel):
        drawn = draw(whole, 64, generator=generator)
    else:
        temperature = 1.0 if isinstance(model, AutoencoderModel) else 0.8
        drawn = distributed.sample(whole, 64, generator=generator, temperature=temperature)
    if distributed.first():
        pictures.save_picture(pictures.image_grid(drawn.reshape(-1, *data.shape), data.bins), path)


def _pictures(trainer: Trainer, data: Dataset | Points) -> dict[str, Callable[[Path], object]]:
    """What one rank draws at the end of a run, by the names of the files."""
    model, history = trainer.model, trainer.history
    names = SIDES if isinstance(model, AdversarialModel) else tuple(history[0] if history else ())
    curves = {name: [h[name] for h in history] for name in names}
    unit = "loss" if names == SIDES else "bits per dimension" if "bits_per_dim" in curves else "nats or squared error"
    drawn: dict[str, Callable[[Path], object]] = {
        "loss.png": lambda path: pictures.plot_losses(curves, path, ylabel=unit)
    }
    if isinstance(model, AutoencoderModel):
        held_out = data.test[:32]
        drawn["reconstructions.png"] = lambda path: pictures.save_picture(
            pictures.reconstruction_grid(model, held_out), path
        )
        if model.latent_dim == 2 and model.prior:
            drawn["latent.png"] = lambda path: pictures.save_picture(pictures.latent_grid(model), path)
    return drawn


# ---- a run ----


@checkpoints.holding_folder
def train(
    name: str,
    data: Dataset | Points,
    out: str | Path,
    *,
    config: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    save_every: int = 200,
    sample_every: int = 500,
    parallel: Literal["ddp", "fsdp"] = "ddp",
) -> dict[str, Any]:
    """Trains ``models.NAMES[name]`` on ``data`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``log.csv``, ``loss.png``, ``samples.png`` and
    ``metrics.json``, in which are the held-out figures of the model, of a VAE the evidence lower bound in nats and in
    bits per dimension, its two parts, and the bound of 64 importance-weighted samples. Of an autoencoder there are
    ``reconstructions.png`` of held-out images, and ``latent.png`` where the latent space is a plane with a prior; of an
    adversarial model the same latents drawn every so often, in ``progress/``, and its checkpoints hold the averaged
    generator as the model and the rest beside it. Ctrl-C and SIGTERM write a last checkpoint and then raise
    KeyboardInterrupt. A picture that cannot be drawn is a line on standard error.

    Args:
        config: of the model, beside what the data decide.
        recipe: fields of :class:`genfast.models.Recipe` that replace an adversarial model's own.
        steps: whichever of ``steps`` and ``minutes`` ends first; 1000 steps without either. A step of an adversarial
            model is one update of the generator.
        minutes: of training.
        out: the folder.
        batch_size: over all processes.
        lr: learning rate, 1e-3 by default; of both sides of an adversarial model, by default what its recipe has.
        seed: of the initial values, the order of the data and the samples.
        device: cpu or cuda; under torchrun each process takes a GPU of its own.
        resume: goes on from the newest checkpoint there, with the recipe that it was trained with.
        sample_every: steps of an adversarial model between two pictures; 0 for none on the way.
        parallel: under torchrun: every process has the whole model (ddp), or its shards of one that is too large for
            that (fsdp); see :func:`genfast.training.distributed.parallel`.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is no checkpoint, or it lacks a file.
        BlockingIOError: another process trains in ``out``.
        ValueError: model, data, recipe and checkpoint that do not fit each other, or a checkpoint that is damaged.
        ImportError: matplotlib, which draws the curves, is not installed.
        TrainingError: a loss or a gradient is not finite, or a loss is far above what it began with.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    check_plots()
    check_length(steps, minutes)
    if sample_every < 0:
        raise ValueError(f"train: sample_every={sample_every}, expected at least 0")
    torch.manual_seed(seed)
    view, config = fitted(name, data, config or {})
    model, checkpoint = checkpoints.begin(out, name, resume, config)
    adversarial, chosen = isinstance(model, AdversarialModel), None
    if adversarial:
        changes = ({} if lr is None else dict.fromkeys(("generator_lr", "critic_lr"), lr)) | (recipe or {})
        if checkpoint is None or changes:
            chosen = dataclasses.replace(model.recipe, **changes)
        else:
            chosen = checkpoint_recipe(checkpoint)
    elif recipe:
        raise ValueError(f"train: {name} takes no {', '.join(recipe)}")
    trainer = Trainer(
        model, view, recipe=chosen, batch_size=batch_size, lr=lr, seed=seed, device=device, parallel=parallel
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    history, began = trainer.history, len(trainer.history)
    samples = functools.partial(_draw_samples, trainer, data, seed)

    def save() -> None:
        if isinstance(model, AutoencoderModel):
            with evaluating(model):
                model.fit(data.train[:10_000])
        checkpoints.save(out, name, model, trainer.state(), data.bins, trainer.weights())

    def every() -> None:
        if adversarial and sample_every and len(history) % sample_every == 0:
            attempt(samples, out / "progress" / f"step-{len(history):07d}.png")

    seconds = loop(
        trainer.step,
        lambda: len(history),
        save,
        out,
        title=f"{name} on {data.name}",
        steps=steps,
        minutes=minutes,
        save_every=save_every,
        every=every,
        diverged=trainer.diverged,
    )
    model.eval()
    tail = history[-50:]
    means = {k: sum(h[k] for h in tail) / len(tail) for k in (tail[0] if tail else ())}
    held_out = trainer.evaluate()
    written: dict[str, Any] = {
        "model": name,
        "data": data.name,
        "steps": len(history),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "steps_per_second": (len(history) - began) / seconds if seconds else 0.0,
    }
    if adversarial:
        written |= {"recipe": dataclasses.asdict(model.recipe)} | {
            f"{side}_loss": means.get(side, 0.0) for side in SIDES
        }
        if isinstance(data, Points) and data.centres is not None:
            scores = metrics.mode_scores(trainer.sample(10_000), data.centres, data.std)
            written |= {"modes": len(data.centres)} | scores._asdict()
    else:
        written |= {f"train_{k}": v for k, v in means.items()} | {f"test_{k}": v for k, v in held_out.items()}
    if isinstance(model, models.VAE):
        written["likelihood"] = model.likelihood
    write_results(written, (_pictures(trainer, data) if distributed.first() else {}) | {"samples.png": samples}, out)
    fault = trainer.diverged(held_out)
    if fault is not None:
        raise TrainingError(f"{fault}; see {out}")
    read: dict[str, Any] = json.loads(json.dumps(written))
    return read
