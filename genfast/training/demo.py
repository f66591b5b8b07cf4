"""The main job: a flow and a PixelCNN on real digits, and a WGAN-GP, trained with genfast beside the same in plain
PyTorch."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import models
from .._peak_memory import peak_bytes
from . import data, pictures
from .trainer import Trainer

CONFIG: dict[str, Any] = {"levels": 2, "steps": 8, "hidden": 64}
EARLY = 50  # steps over which the loss curves are compared one by one
BLOCK = 10  # steps of one model before the other's turn, so that a drift of the machine meets both


def run(out: Path, seconds: float) -> int:
    """Trains, compares, draws; returns the exit status.

    Args:
        out: folder for the pictures and the metrics.
        seconds: how long to train, both models together; at least two blocks of each are trained.
    """
    from tqdm import tqdm

    digits = data.load("digits")
    print(f"data: {len(digits.train)} handwritten digits to train on, {len(digits.test)} held out", flush=True)
    trainers: dict[str, Trainer] = {}
    for label, build, last in (("genfast", models.Glow, True), ("plain PyTorch", models.plain(models.Glow), False)):
        torch.manual_seed(0)  # the same initial weights, and below the same batches and noise
        model = build(digits.shape, **CONFIG, channels_last=last)
        trainers[label] = Trainer(model, digits, batch_size=64, lr=1e-3)
    count = sum(p.numel() for p in trainers["genfast"].model.parameters())
    print(f"model: Glow, {CONFIG['levels']} levels of {CONFIG['steps']} steps, {count:,} parameters", flush=True)
    spent = dict.fromkeys(trainers, 0.0)
    for trainer in trainers.values():  # the first steps start threads and set the activation norms
        for _ in range(2):
            trainer.step()
    warm = 2
    began = time.monotonic()
    quiet = not sys.stderr.isatty()
    bar = tqdm(total=round(seconds), unit="s", disable=quiet, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}s {postfix}")
    blocks = 0
    while blocks < 2 or time.monotonic() - began < 0.6 * seconds:
        _steps_of_each(trainers, BLOCK, spent)
        blocks += 1
        bar.n = min(bar.total, round(time.monotonic() - began))
        bar.set_postfix_str(f"side by side, {trainers['genfast'].history[-1]['bits_per_dim']:.3f} bits/dim")
        if quiet and blocks % 20 == 0:
            print(
                f"  {blocks * BLOCK} steps each, {trainers['genfast'].history[-1]['bits_per_dim']:.3f} bits/dim",
                flush=True,
            )
    ours = trainers["genfast"]
    together = len(ours.history)
    curves = {label: [h["bits_per_dim"] for h in t.history] for label, t in trainers.items()}
    rows = {}
    for label, trainer in trainers.items():
        rate = (together - warm) / spent[label]
        rows[label] = (rate, peak_bytes(trainer.step) / 2**20, trainer.evaluate()["bits_per_dim"])
    while time.monotonic() - began < seconds:  # the rest of the time belongs to genfast alone
        for _ in range(BLOCK):
            ours.step()
        bar.n = min(bar.total, round(time.monotonic() - began))
        bar.set_postfix_str(f"genfast alone, {ours.history[-1]['bits_per_dim']:.3f} bits/dim")
    bar.close()
    # Gradients that are zero but for rounding become whole steps under Adam, so the curves part slowly, then at random.
    apart = max(abs(a - b) / abs(b) for a, b in zip(*(c[:EARLY] for c in curves.values())))
    tail = [sum(c[-20:]) / 20 for c in curves.values()]
    print(f"\n{'':<16}{'steps/s':>9}{'peak MiB':>10}{'held-out bits/dim':>19}   after {together} steps, batch 64")
    for label, (rate, peak, bits) in rows.items():
        print(f"{label:<16}{rate:>9.2f}{peak:>10.1f}{bits:>19.3f}")
    fast, slow = rows["genfast"], rows["plain PyTorch"]
    print(f"{'ratio':<16}{fast[0] / slow[0]:>8.2f}x{fast[1] / slow[1]:>9.2f}x")
    print(f"loss curves: at most {apart:.1e} apart (relative) over the first {min(EARLY, together)} steps, ", end="")
    print(f"{abs(tail[0] - tail[1]) / tail[1]:.1e} over the mean of the last 20")
    final = ours.evaluate()["bits_per_dim"]
    print(f"genfast after {len(ours.history)} steps: {final:.3f} bits/dim on held-out digits")
    flow: Any = ours.model.eval()
    generator = torch.Generator().manual_seed(0)
    samples = flow.sample(64, temperature=0.7, generator=generator)
    pictures.save_picture(pictures.image_grid(samples, digits.bins), out / "samples.png")
    pictures.save_picture(pictures.image_grid(digits.test[:64], digits.bins), out / "data.png")
    pictures.plot_losses(curves, out / "loss.png")
    ends = [models.dequantize(digits.test[part], digits.bins) for part in (slice(0, 8), slice(8, 16))]
    path = flow.interpolate(ends[0], ends[1], 8)
    pictures.save_picture(
        pictures.image_grid(path.transpose(0, 1).flatten(0, 1), digits.bins), out / "interpolation.png"
    )
    print(f"pictures: {', '.join(str(out / f'{n}.png') for n in ('samples', 'data', 'loss', 'interpolation'))}")
    pixelcnn(digits, out, seconds / 3)
    wgan_gp(out, seconds / 3)
    return 0


def _steps_of_each(trainers: dict[str, Trainer], count: int, spent: dict[str, float]) -> None:
    """Takes ``count`` steps of one trainer after the other, and adds the seconds that each took to ``spent``."""
    for label, trainer in trainers.items():
        start = time.perf_counter()
        for _ in range(count):
            trainer.step()
        spent[label] += time.perf_counter() - start


def pixelcnn(digits: data.Dataset, out: Path, seconds: float) -> None:
    """Trains two PixelCNNs in turn, draws the same 64 digits with both samplers, and completes digits from their upper
    half."""
    config: dict[str, Any] = {
        "channels": 64,
        "layers": 6,
        "kernel_size": 5,
        "levels": digits.bins,
        "shape": digits.shape,
    }
    trainers: dict[str, Trainer] = {}
    for label, build in (("genfast", models.PixelCNN), ("plain PyTorch", models.plain(models.PixelCNN))):
        torch.manual_seed(0)
        trainers[label] = Trainer(build(**config), digits, batch_size=64, lr=2e-3)
        for _ in range(2):
            trainers[label].step()
    count = sum(p.numel() for p in trainers["genfast"].model.parameters())
    print(f"\nmodel: PixelCNN, 6 layers of 5 x 5, 64 channels, {count:,} parameters", flush=True)
    spent = dict.fromkeys(trainers, 0.0)
    steps, began = 0, time.monotonic()
    while steps < BLOCK or time.monotonic() - began < seconds:
        _steps_of_each(trainers, BLOCK, spent)
        steps += BLOCK
    both: dict[str, Any] = {label: trainer.model.eval() for label, trainer in trainers.items()}
    ours = both["genfast"]
    both["plain PyTorch"].load_state_dict(ours.state_dict())  # so that both draw from one distribution
    uniforms = torch.rand((64, 1, *digits.shape[1:]), generator=torch.Generator().manual_seed(0))
    drawn: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[float, float]] = {}
    for label, model in both.items():
        best = []
        for _ in range(3):
            start = time.perf_counter()
            drawn[label] = model.sample(64, uniforms=uniforms)
            best.append(time.perf_counter() - start)
        rows[label] = (steps / spent[label], min(best) * 1e3)
    bits = trainers["genfast"].evaluate()["bits_per_dim"]
    print(f"{'':<16}{'steps/s':>9}{'64 samples, ms':>16}   after {steps} steps, {bits:.3f} bits/dim on held-out digits")
    for label, (rate, milliseconds) in rows.items():
        print(f"{label:<16}{rate:>9.2f}{milliseconds:>16.1f}")
    fast, slow = rows["genfast"], rows["plain PyTorch"]
    print(f"{'ratio':<16}{fast[0] / slow[0]:>8.2f}x{slow[1] / fast[1]:>15.1f}x")
    differ = int((drawn["genfast"] != drawn["plain PyTorch"]).flatten(1).any(1).sum())
    print(f"images that differ between the two samplers, same random numbers: {differ} of 64")
    pictures.save_picture(pictures.image_grid(drawn["genfast"], digits.bins), out / "pixelcnn.png")
    halves = digits.test[:8].long()
    whole = [ours.sample(8, prefix=halves[:, :, :4], generator=torch.Generator().manual_seed(k)) for k in range(7)]
    grid = torch.cat([halves, *whole]).unflatten(0, (8, 8)).transpose(0, 1).flatten(0, 1)
    pictures.save_picture(pictures.image_grid(grid, digits.bins), out / "completion.png")
    print(
        f"pictures: {out / 'pixelcnn.png'}, {out / 'completion.png'} (first column real, then its upper half completed)"
    )


def wgan_gp(out: Path, seconds: float) -> None:
    """Trains WGAN-GP on 25 Gaussians twice in turn: genfast's critic step, and the penalty by double backward."""
    points = data.points("25gaussians")
    trainers: dict[str, Trainer] = {}
    for label, method in (("genfast", "auto"), ("plain PyTorch", "autograd")):
        torch.manual_seed(0)
        model = models.WGANGP(points.shape)
        model.method = method
        trainers[label] = Trainer(model, points, batch_size=256)
        trainers[label].step()
    count = sum(p.numel() for p in model.parameters())
    print(
        f"\nmodel: WGAN-GP, perceptrons of 3 x 512, {count:,} parameters, five critic updates a step, batch 256",
        flush=True,
    )
    spent = dict.fromkeys(trainers, 0.0)
    steps, began = 0, time.monotonic()
    while steps < BLOCK or time.monotonic() - began < seconds:
        _steps_of_each(trainers, BLOCK // 5, spent)
        steps += BLOCK // 5
    ours, theirs = trainers["genfast"], trainers["plain PyTorch"]
    apart = max(
        abs(a["critic"] - b["critic"]) / abs(b["critic"]) for a, b in zip(ours.history[:BLOCK], theirs.history[:BLOCK])
    )
    for label, trainer in trainers.items():
        last = trainer.history[-1]
        print(f"{label:<16}{steps / spent[label]:>9.2f} steps/s, critic {last['critic']:.3f} after {steps} steps")
    print(f"{'ratio':<16}{spent['plain PyTorch'] / spent['genfast']:>8.2f}x", end="")
    print(f"; critic losses at most {apart:.1e} apart (relative) over the first {BLOCK} steps")
    path = out / "wgan_gp.png"
    pictures.draw_points(ours.sample(2000), path, real=points.train[:2000], critic=ours.task.critic)
    print(f"picture: {path} (samples over data and the critic's contours; modes take some thousand steps)")
