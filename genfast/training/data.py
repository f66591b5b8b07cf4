"""Real data without downloads: digits and photographs that scikit-learn ships, image folders, torchvision sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._pictures import colour, picture, scikit_learn

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Dataset:
    """Images as whole numbers in [0, bins), uint8 (N, C, H, W), split into train and test.

    Raises:
        ValueError: fewer than two levels.
    """

    name: str
    train: Tensor
    test: Tensor
    bins: int = 256
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"Dataset: bins={self.bins}, expected at least 2 levels")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), or (D,) once flattened for a model of vectors."""
        return tuple(self.train.shape[1:])


@dataclass(frozen=True)
class Points:
    """Points of a plane, float32 (N, D), split into train and test; ``centres`` (K, D) and ``std`` where they are a
    mixture."""

    name: str
    train: Tensor
    test: Tensor
    centres: Tensor | None = None
    std: float = 0.0
    train_labels: Tensor | None = None
    bins: int = 0  # no grey levels

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return tuple(self.train.shape[1:])


@dataclass(frozen=True)
class Table:
    """A real table, float32 (N, D), standardised: what the source holds is ``mean + std * train``, the training part's
    own.

    A log density of these numbers less ``std.log().sum()`` is one of the source's.
    """

    name: str
    train: Tensor
    test: Tensor
    mean: Tensor
    std: Tensor
    train_labels: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return tuple(self.train.shape[1:])


TABLES = ("breast_cancer", "diabetes", "digits", "iris", "wine")
POINTS = ("25gaussians", "8gaussians", "swissroll")


def points(name: str, *, count: int = 100_000, seed: int = 0) -> Points:
    """A set of points in the plane, as the toy experiments of WGAN-GP (arXiv:1704.00028, figure 1; gan_toy.py) have
    them.

    Args:
        name: "25gaussians": on the grid {-4, -2, 0, 2, 4}^2 with standard deviation 0.05, all divided by 2.828.
            "8gaussians": on a circle of radius 2 with standard deviation 0.02, divided by 1.414.
            "swissroll": scikit-learn's, noise 0.25, its first and last coordinate, divided by 7.5.
        count: how many points; a tenth of them for testing.
        seed: of the points.

    Raises:
        ValueError: another name, or fewer than two points.
        ImportError: the swiss roll needs scikit-learn.

    Example:
        >>> import genfast
        >>> genfast.data.points("8gaussians", count=100).centres.shape
        torch.Size([8, 2])
    """
    if name not in POINTS:
        raise ValueError(f"points: name={name!r}, expected one of {', '.join(map(repr, POINTS))}")
    if count < 2:
        raise ValueError(f"points: count={count}, expected at least 2")
    test = max(1, count // 10)
    if name == "swissroll":
        found = scikit_learn("the swiss roll needs").make_swiss_roll(n_samples=count, noise=0.25, random_state=seed)[0]
        values = torch.from_numpy(found[:, [0, 2]].astype(np.float32) / 7.5)
        return Points(name, values[test:], values[:test])
    if name == "25gaussians":
        grid = torch.arange(-4.0, 5.0, 2.0) / 2.828
        centres, std = torch.cartesian_prod(grid, grid), 0.05 / 2.828
    else:
        angles = torch.arange(8) * (torch.pi / 4)
        centres, std = 2 / 1.414 * torch.stack([angles.cos(), angles.sin()], 1), 0.02 / 1.414
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(centres), (count,), generator=generator)
    values = centres[labels] + std * torch.randn(count, 2, generator=generator)
    return Points(name, values[test:], values[:test], centres, std, labels[test:])


def table(name: str, *, seed: int = 0) -> Table:
    """A real table that scikit-learn ships, for density estimation: a tenth for testing, standardised by the rest.

    Args:
        name: "digits" (1797 x 64): whole numbers 0 to 16 plus uniform noise, (x + u) / 17, so that a density of them is
            bounded. "breast_cancer" (569 x 30), "diabetes" (442 x 10, of which the sex takes two values), "iris" (150 x
            4, in steps of 0.1), "wine" (178 x 13): as they are.
        seed: of the split, which is that of :func:`load`, and of the noise.

    Raises:
        ValueError: another name.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import genfast
        >>> genfast.data.table("wine").shape
        (13,)
    """
    if name not in TABLES:
        raise ValueError(f"table: name={name!r}, expected one of {', '.join(map(repr, TABLES))}")
    found = getattr(scikit_learn("the tables need"), f"load_{name}")()
    values = torch.from_numpy(np.asarray(found.data, dtype=np.float64))
    if name == "digits":
        noise = torch.rand(values.shape, dtype=values.dtype, generator=torch.Generator().manual_seed(seed))
        values = (values + noise) / 17
    train, test, *labels = _split(values, torch.from_numpy(np.asarray(found.target)), seed)
    mean, std = train.mean(0), train.std(0, correction=0)
    train, test = (((part - mean) / std).float() for part in (train, test))
    return Table(name, train, test, mean.float(), std.float(), *labels)


def binarized(data: Dataset) -> Dataset:
    """The images in black and white: 1 where a grey level is in the upper half of its levels.

    Example:
        >>> import genfast
        >>> genfast.data.binarized(genfast.data.load("digits")).bins
        2
    """

    def halves(images: Tensor) -> Tensor:
        return (images >= (data.bins + 1) // 2).to(torch.uint8)

    return Dataset(data.name, halves(data.train), halves(data.test), 2, data.train_labels, data.test_labels)


def load(
    name: str, *, size: int = 32, count: int = 4096, seed: int = 0, root: str | None = None, background: str = "white"
) -> Dataset:
    """A data set of images by name.

    Args:
        name: "digits": 1797 handwritten digits, 8x8, 17 grey levels. "photos": RGB patches cut at random from two
            photographs; train and test come from different parts of them. "torchvision:CIFAR10" and the like, from
            files that are already under ``root``. Anything else is a folder of images.
        size: side of photo patches and of images from a folder (scaled to cover, cropped at the centre).
        count: how many photo patches, test included.
        seed: of the split and of the crops.
        root: where torchvision's files are.
        background: the colour behind what is transparent in a folder's images; see :func:`picture`.

    Raises:
        ImportError: scikit-learn or torchvision is needed and not installed.
        FileNotFoundError: a folder that is not there, or torchvision files that are not.
        ValueError: a folder without images or with one that cannot be read, or an unknown torchvision set.

    Example:
        >>> import genfast
        >>> genfast.data.load("digits").shape
        (1, 8, 8)
    """
    if name in POINTS:
        raise ValueError(
            f"data: {name!r} are points, which genfast.data.points makes and GANs train on; expected images"
        )
    colour(background)  # whose name is wrong whatever the data are
    if name == "digits":
        return _digits(seed)
    if name == "photos":
        return _photos(size, count, seed)
    if name.startswith("torchvision:"):
        return _torchvision(name.split(":", 1)[1], root)
    return _folder(name, size, seed, background)


def _split(images: Tensor, labels: Tensor | None, seed: int) -> tuple[Any, ...]:
    """A tenth, at least one image, for testing."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(images) // 10)
    test, train = order[:cut], order[cut:]
    return images[train], images[test], *((None, None) if labels is None else (labels[train], labels[test]))


def _digits(seed: int) -> Dataset:
    found = scikit_learn().load_digits()
    images = torch.from_numpy(found.images.astype(np.uint8))[:, None]
    train, test, train_labels, test_labels = _split(images, torch.from_numpy(found.target.astype(np.int64)), seed)
    return Dataset("digits", train, test, 17, train_labels, test_labels)


def _photos(size: int, count: int, seed: int) -> Dataset:
    photos = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in scikit_learn().load_sample_images().images]
    height, width = photos[0].shape[1:]
    border = width * 4 // 5  # left of it is for training, right of it for testing
    if not 1 <= size <= min(height, width - border):
        raise ValueError(f"photos: size={size}, expected 1 to {min(height, width - border)}")
    if count < 2:
        raise ValueError(f"photos: count={count}, expected at least 2")
    generator = torch.Generator().manual_seed(seed)

    def crops(number: int, left: int, right: int) -> Tensor:
        def draw(limit: int) -> list[int]:
            drawn: list[int] = torch.randint(limit, (number,), generator=generator).tolist()
            return drawn

        rows, columns, which = draw(height - size + 1), draw(right - left - size + 1), draw(len(photos))
        return torch.stack(
            [photos[k][:, r : r + size, left + c : left + c + size] for r, c, k in zip(rows, columns, which)]
        )

    test = max(1, count // 10)
    return Dataset("photos", crops(count - test, 0, border), crops(test, border, width))


def _folder(name: str, size: int, seed: int, background: str) -> Dataset:
    folder = Path(name)
    if not name.strip() or not folder.is_dir():
        raise FileNotFoundError(
            f"data: {name!r} is neither 'digits', 'photos', 'torchvision:NAME' nor a folder of images"
        )
    if size < 1:
        raise ValueError(f"data: size={size}, expected at least 1")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
    if len(files) < 2:
        raise ValueError(f"data: {name!r} holds {len(files)} images, expected at least 2 of {', '.join(SUFFIXES)}")
    from PIL import ImageOps

    images = [np.asarray(ImageOps.fit(picture(file, background=background), (size, size))) for file in files]
    train, test, _, _ = _split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), None, seed)
    return Dataset(folder.resolve().name or "folder", train, test)


def _torchvision(name: str, root: str | None) -> Dataset:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("data: torchvision sets need torchvision, which is not installed") from error
    if not hasattr(datasets, name):
        raise ValueError(f"data: torchvision.datasets has no {name!r}")
    if root is None:
        raise ValueError(f"data: torchvision:{name} needs root, the folder that holds its files")
    try:
        parts = [getattr(datasets, name)(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"data: the files of torchvision:{name} are not under {root!r}: {error}") from error

    def tensor(part: Any) -> Tensor:
        values = torch.as_tensor(np.asarray(part.data))
        return values[:, None] if values.dim() == 3 else values.permute(0, 3, 1, 2).contiguous()

    labels = [torch.as_tensor(np.asarray(p.targets)) for p in parts]
    return Dataset(name, tensor(parts[0]), tensor(parts[1]), 256, labels[0], labels[1])
