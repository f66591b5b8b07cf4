"""How good samples are: modes of a mixture counted, and FID, KID and inception score on a feature network of the
user's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ModeScores(NamedTuple):
    """What :func:`mode_scores` counts.

    covered: centres that have at least ``minimum`` samples within three standard deviations.
    within_3, within_4: the share of samples within three and four standard deviations of their nearest centre.
    kl: from the uniform distribution to that of the samples over their nearest centres, nats: sum p log(p K).
    """

    covered: int
    within_3: float
    within_4: float
    kl: float


def mode_scores(samples: Tensor, centres: Tensor, std: float, *, minimum: int | None = None) -> ModeScores:
    """Modes covered and the share of good samples of a mixture of equal Gaussians.

    Good is within three standard deviations of a centre in VEEGAN (arXiv:1705.07761, section 4.1), within four in
    discriminator rejection sampling (arXiv:1810.06758, section 4.1). Of true samples in the plane, 98.9% and 99.97%
    are.

    Args:
        samples: (N, D), floating point.
        centres: (K, D).
        std: of every Gaussian in every direction.
        minimum: how many good samples cover a mode. By default a twentieth of a mode's equal share, N / (20 K), and at
            least two. One sample, which is enough in VEEGAN, covers modes by chance: of 10,000 points spread evenly
            over the square of the 25 Gaussians every mode has 7 within three standard deviations, where this default
            asks for 20.

    Raises:
        ValueError: shapes that do not fit, no samples, or a ``std`` or ``minimum`` that is not positive.

    Example:
        >>> import torch, genfast
        >>> genfast.metrics.mode_scores(torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 0.1).covered
        1
    """
    if (
        samples.dim() != 2
        or centres.dim() != 2
        or samples.shape[1] != centres.shape[1]
        or not len(samples)
        or not len(centres)
    ):
        raise ValueError(
            f"mode_scores: samples {tuple(samples.shape)} and centres {tuple(centres.shape)}, expected (N, D) and (K, "
            "D)"
        )
    if minimum is None:
        minimum = max(2, -(-len(samples) // (20 * len(centres))))
    if not std > 0 or minimum < 1:
        raise ValueError(f"mode_scores: std={std} and minimum={minimum}, expected positive numbers")
    distance, nearest = torch.cdist(samples.double(), centres.to(samples.device).double()).min(1)
    good = distance <= 3 * std
    hits = torch.bincount(nearest[good], minlength=len(centres))
    share = torch.bincount(nearest, minlength=len(centres)).double() / len(samples)
    kl = torch.special.xlogy(share, share * len(centres)).sum()
    within_4 = (distance <= 4 * std).double().mean()
    return ModeScores(int((hits >= minimum).sum()), float(good.double().mean()), float(within_4), float(kl))


class ImageScores(NamedTuple):
    """fid; kid and its standard deviation over subsets; inception_score and its standard deviation, None without
    logits."""

    fid: float
    kid: float
    kid_std: float
    inception_score: float | None
    inception_score_std: float | None


class _Features(nn.Module):
    """A user's network as the metrics take it: (N, D) float features."""

    def __init__(self, network: Callable[[Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.network, self.num_features = network, num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).flatten(1)


@torch.no_grad()
def image_scores(
    real: Tensor,
    fake: Tensor,
    features: Callable[[Tensor], Tensor],
    *,
    logits: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> ImageScores:
    """FID (arXiv:1706.08500), KID (arXiv:1801.01401) and inception score (arXiv:1606.03498), computed by torchmetrics.

    Only figures from the same features, images and numbers of samples may be compared.

    Args:
        real, fake: images (N, C, H, W) as ``features`` takes them; at least two, and for a FID that means something,
            more than features.
        features: a network in evaluation mode, (N, C, H, W) to (N, D) or (N, ...), which is flattened.
        logits: of a classifier, (N, K), for the inception score.
        batch_size: of the images that go through the networks at once.
        seed: of the subsets of KID and the splits of the inception score.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: fewer than two images, or images of other shapes in ``fake`` than in ``real``.

    Example:
        >>> import torch, genfast
        >>> images = torch.rand(64, 1, 4, 4)
        >>> genfast.metrics.image_scores(images, images, torch.nn.Flatten()).fid < 1e-3  # doctest: +SKIP
        True
    """
    if min(len(real), len(fake)) < 2 or real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"image_scores: real {tuple(real.shape)} and fake {tuple(fake.shape)}, expected two images at least, of "
            "one shape"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept, and that what is not used here is not installed
        return _image_scores(real, fake, features, logits, batch_size, seed)


def _image_scores(
    real: Tensor,
    fake: Tensor,
    features: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor] | None,
    batch_size: int,
    seed: int,
) -> ImageScores:
    try:  # not from torchmetrics.image, which exports them only where torch-fidelity's own network is
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError(
            "metrics: FID, KID and inception score need torchmetrics: pip install torchmetrics"
        ) from error
    width = features(real[:2]).flatten(1).shape[1]
    network = _Features(features, width)
    subset = max(2, min(len(real) // 2, len(fake) // 2, 1000))
    given: list[Any] = [
        FrechetInceptionDistance(feature=network, normalize=True),
        KernelInceptionDistance(feature=network, normalize=True, subset_size=subset),
    ]
    for metric in given:
        for images, is_real in ((real, True), (fake, False)):
            for batch in images.split(batch_size):
                metric.update(batch, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fid, (kid, kid_std) = given[0].compute(), given[1].compute()
        score: tuple[float | None, float | None] = (None, None)
        if logits is not None:
            inception = InceptionScore(feature=_Features(logits, 0), splits=min(10, len(fake)))
            for batch in fake.split(batch_size):
                inception.update(batch)
            mean, std = inception.compute()
            score = (float(mean), float(std))
    return ImageScores(float(fid), float(kid), float(kid_std), *score)
