"""Pictures of a run: grids of samples, curves, points over the contours of a critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_atomically
from .._modes import evaluating
from ..models import AutoencoderModel


def image_grid(images: Tensor, bins: int, *, columns: int = 8, scale: int | None = None) -> Any:
    """Images in [-0.5, 0.5] or whole numbers in [0, bins), (N, C, H, W), as one PIL image, enlarged to be looked at."""
    from PIL import Image

    if images.is_floating_point():
        images = ((images + 0.5) * bins).floor().clamp(0, bins - 1)
    n, c, h, w = images.shape
    columns = min(columns, max(n, 1))
    rows = -(-n // columns)
    values = (images.float() * (255 / max(1, bins - 1))).round().to(torch.uint8).cpu()
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
        with torch.no_grad(), evaluating(critic):
            values = critic(at).reshape(128, 128).T.cpu()  # rows are the second coordinate
        axes.contour(line, line, values, levels=20, cmap="viridis", linewidths=0.7, alpha=0.8)
    if real is not None:
        axes.scatter(real[:, 0].cpu(), real[:, 1].cpu(), s=4, color="#d08a2e", label="data", linewidths=0)
    axes.scatter(samples[:, 0].cpu(), samples[:, 1].cpu(), s=4, color="#2a9d5c", label="samples", linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    if real is not None:
        axes.legend(loc="upper right")
    write_atomically(path, lambda p: figure.savefig(p, dpi=110))
    pyplot.close(figure)


def draw(
    samples: Tensor, path: Path, *, bins: int, real: Tensor | None = None, critic: nn.Module | None = None
) -> None:
    """Samples (N, D) or (N, C, H, W) in [-1, 1] as a PNG: points, or a grid of images with ``bins`` levels."""
    if samples.dim() == 2:
        draw_points(samples, path, real=real, critic=critic)
    else:
        save_picture(image_grid(samples / 2, bins), path)


def reconstruction_grid(model: AutoencoderModel, images: Tensor, *, columns: int = 8) -> Any:
    """Rows of images, each above the row of what the model makes of them, as one PIL image."""
    images = images[: len(images) // columns * columns] if len(images) > columns else images
    again = model.reconstruct(images).cpu()
    pairs = [t for both in zip(images.split(columns), again.split(columns)) for t in both]
    return image_grid(torch.cat([t.long() for t in pairs]), model.levels, columns=columns)


@torch.no_grad()
def latent_grid(model: AutoencoderModel, side: int = 15) -> Any:
    """The images of a grid over a latent plane, at equal steps of the prior's probability, as one PIL image.

    Kingma and Welling, arXiv:1312.6114, appendix A: figure 4.

    Raises:
        ValueError: the latent space is no plane, or has no prior N(0, 1).
    """
    if model.latent_dim != 2 or not model.prior:
        raise ValueError(
            f"latent_grid: latent_dim={model.latent_dim} and prior={model.prior}, expected a plane with a prior"
        )
    line = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    at = (
        torch.cartesian_prod(-line, line).flip(1).to(next(model.parameters()))
    )  # rows from the top, columns from the left
    return image_grid(model.levels_of(model.decode(at)), model.levels, columns=side)
