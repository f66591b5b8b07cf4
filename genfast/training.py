"""Training a model of images: a loop with progress, checkpoints that a crash cannot tear, and pictures of how it went."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints, distributed, models
from .data import Dataset
from .reference.autoregressive import AutoregressiveModel
from .reference.modes import evaluating
from .sampling import LoweringError

latest, load_checkpoint = checkpoints.latest, checkpoints.load
Model = models.DensityModel | AutoregressiveModel


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is kept."""


# ---- files, written whole or not at all ----


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


def image_grid(images: Tensor, bins: int, *, columns: int = 8, scale: int | None = None) -> Any:
    """Images in [-0.5, 0.5] or whole numbers in [0, bins), (N, C, H, W), as one PIL image, enlarged to be looked at."""
    from PIL import Image

    if images.is_floating_point():
        images = ((images + 0.5) * bins).floor().clamp(0, bins - 1)
    n, c, h, w = images.shape
    columns = min(columns, max(n, 1))
    rows = -(-n // columns)
    values = (images.float() * (255 / (bins - 1))).round().to(torch.uint8).cpu()
    grid = torch.full((c, rows * (h + 1) + 1, columns * (w + 1) + 1), 64, dtype=torch.uint8)
    for i, image in enumerate(values):
        top, left = 1 + i // columns * (h + 1), 1 + i % columns * (w + 1)
        grid[:, top : top + h, left : left + w] = image
    picture = Image.fromarray(grid[0].numpy() if c == 1 else grid[:3].permute(1, 2, 0).contiguous().numpy())
    scale = max(1, 512 // picture.width) if scale is None else scale
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_picture(picture: Any, path: Path) -> None:
    """A PIL image as a file, whole or not at all."""
    write_atomically(path, lambda p: picture.save(p))


def plot_losses(curves: dict[str, list[float]], path: Path, *, ylabel: str = "bits per dimension") -> None:
    """Loss curves as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (label, values) in enumerate(curves.items()):
        axes.plot(range(1, len(values) + 1), values, label=label, linewidth=2.5 - i, linestyle="-" if i == 0 else "--")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))
    pyplot.close(figure)


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
            TrainingError: the loss is not finite, on all ranks together.
        """
        if distributed.size() > 1:  # one process goes on with the numbers that torch draws
            distributed.seed(self.seed, len(self.losses))
        self._to_training()
        loss = self.objective(self._portion(self.batch(), self.generator))
        self.optimizer.zero_grad()
        loss.backward()
        value = distributed.total(float(loss.detach()))[0] / distributed.size()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {len(self.losses) + 1}: lower the learning rate; the last checkpoint is kept"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
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


@contextlib.contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """On several ranks: whether Ctrl-C was pressed, in place of raising in the middle of what the others wait for."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True

    if distributed.size() == 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def loop(
    step: Callable[[], str], done: Callable[[], int], save: Callable[[], object], out: Path, *, title: str, steps: int | None,
    minutes: float | None, save_every: int, every: Callable[[], None] | None = None,
) -> float:  # fmt: skip
    """Calls ``step``, which says how it went, until ``done`` is ``steps`` or the minutes are over; returns the seconds.

    1000 steps without either. Saves every ``save_every`` steps and at the end, Ctrl-C included, which it raises again, no step
    twice; calls ``every`` after each step. Ranks stop after the same step: whichever is asked to, or is the first out of time.
    """
    from tqdm import tqdm

    if steps is None and minutes is None:
        steps = 1000
    start, saved = time.monotonic(), done()  # a run that goes on has its checkpoint

    def keep() -> None:
        nonlocal saved
        if done() != saved or not saved:
            save()
            saved = done()

    hidden = not (distributed.first() and sys.stderr.isatty())
    bar = tqdm(total=steps, initial=done(), unit="step", disable=hidden, desc=title)
    with _interruption() as pressed:
        try:
            while steps is None or done() < steps:
                late = minutes is not None and time.monotonic() - start >= 60 * minutes
                stop, end = distributed.total(pressed(), late)
                if stop:
                    raise KeyboardInterrupt
                if end:
                    break
                bar.set_postfix_str(step(), refresh=False)
                bar.update()
                if done() % save_every == 0:
                    keep()
                if every is not None:
                    every()
        except KeyboardInterrupt:
            keep()
            if distributed.first():
                print(f"stopped at step {done()}; checkpoint kept in {out}", file=sys.stderr)
            raise
        finally:
            bar.close()
        keep()
    return time.monotonic() - start


def train(
    name: str, data: Dataset, out: str | Path, *, config: dict[str, Any] | None = None, steps: int | None = None,
    minutes: float | None = None, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, device: str = "cpu",
    resume: bool = False, save_every: int = 200, parallel: str = "ddp",
) -> dict[str, Any]:  # fmt: skip
    """Trains ``models.NAMES[name]`` on ``data`` and leaves a run's folder; returns the metrics that it wrote.

    The folder holds ``checkpoint-<step>`` (the last two), ``loss.png``, ``samples.png`` and ``metrics.json``. Ctrl-C writes
    a last checkpoint and then raises KeyboardInterrupt; ``resume`` goes on from the newest one.

    Args:
        config: of the model, beside its shape.
        steps, minutes: whichever ends first; 1000 steps without either.
        out: the folder.
        batch_size: over all ranks.
        parallel: how ranks share the work, "ddp" or "fsdp"; see :func:`genfast.distributed.parallel`.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is not set.
        TrainingError: the loss is not finite.
        KeyboardInterrupt: after the last checkpoint has been written.
    """
    out = Path(out)
    if issubclass(models.NAMES.get(name, models.FlowModel), models.AdversarialModel):
        raise ValueError(f"train: {name} is adversarial; train it with genfast.adversarial_training.train")
    if issubclass(models.NAMES.get(name, models.FlowModel), models.AutoencoderModel):
        raise ValueError(f"train: {name} is an autoencoder; train it with genfast.variational_training.train")
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
        lambda: f"{trainer.step():.3f} bits/dim", lambda: len(trainer.losses),
        lambda: checkpoints.save(out, name, model, trainer.state(), data.bins), out, title=f"{name} on {data.name}",
        steps=steps, minutes=minutes, save_every=save_every,
    )  # fmt: skip
    model.eval()
    plain, generator = distributed.whole(model), torch.Generator().manual_seed(seed)
    if isinstance(plain, models.AutoregressiveModel):
        samples = draw(plain, 64, generator=generator)
    else:
        samples = distributed.sample(plain, 64, generator=generator, temperature=0.8)
    metrics = {
        "model": name, "data": data.name, "steps": len(trainer.losses),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_bits_per_dim": sum(trainer.losses[-50:]) / max(1, len(trainer.losses[-50:])),
        "test_bits_per_dim": trainer.evaluate(), "seconds": seconds,
        "steps_per_second": (len(trainer.losses) - began) / seconds if seconds else 0.0,
    }  # fmt: skip
    if distributed.first():
        save_picture(image_grid(samples.reshape(-1, *data.shape), data.bins), out / "samples.png")
        plot_losses({"train": trainer.losses}, out / "loss.png")
        write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics
