"""What every autoencoder has: an encoder, a decoder, images as whole numbers, and the losses that train its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modes import evaluating
from .blocks import mlp, stages
from .phases import Losses as Losses

Network = Literal["perceptron", "convolutional"]


def encoder_network(
    name: str, network: Network, shape: Sequence[int], out: int, *, hidden: int, depth: int, width: int, base: int
) -> nn.Sequential:
    """Images (N, *shape) to (N, out): ``depth`` hidden layers, or convolutions of stride 2 down to ``base`` x
    ``base``."""
    if network == "perceptron":
        return nn.Sequential(nn.Flatten(), *mlp([math.prod(shape), *[hidden] * depth, out], nn.ReLU))
    channels = _channels(name, network, shape, width, base)
    layers: list[nn.Module] = []
    for taken, given in zip([shape[0], *channels[:-1]], channels):
        layers += [nn.Conv2d(taken, given, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * base * base, out))


def decoder_network(
    name: str,
    network: Network,
    shape: Sequence[int],
    latent_dim: int,
    channels_out: int,
    *,
    hidden: int,
    depth: int,
    width: int,
    base: int,
) -> nn.Sequential:
    """Latents (N, latent_dim) to maps (N, channels_out, H, W): the mirror image of :func:`encoder_network`."""
    if network == "perceptron":
        sizes = [latent_dim, *[hidden] * depth, channels_out * math.prod(shape[1:])]
        return nn.Sequential(*mlp(sizes, nn.ReLU), nn.Unflatten(1, (channels_out, *shape[1:])))
    channels = _channels(name, network, shape, width, base)[::-1]
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, channels[0] * base * base),
        nn.Unflatten(1, (channels[0], base, base)),
    ]
    for taken, given in zip(channels, [*channels[1:], channels_out]):
        layers += [nn.ReLU(), nn.ConvTranspose2d(taken, given, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def _channels(name: str, network: str, shape: Sequence[int], width: int, base: int) -> list[int]:
    if network != "convolutional":
        raise ValueError(f"{name}: network={network!r}, expected 'perceptron' or 'convolutional'")
    return [width << i for i in range(stages(name, shape, base))]


class AutoencoderModel(nn.Module):
    """An encoder of images and a decoder from ``latent_dim`` numbers. ``config`` rebuilds the model.

    Images are whole numbers in [0, levels), (N, *shape); the networks see them as values in [-1, 1].
    ``phases`` are the updates of one training step, in order, each by the players that it updates at once; ``losses``
    gives their losses and ``player`` their parameters. :class:`genfast.training.Trainer` does the rest.
    """

    phases: tuple[tuple[str, ...], ...] = (("autoencoder",),)
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    prior = False  # whether codes are trained to follow N(0, 1), or a Gaussian is fitted to them for sampling
    encoder: nn.Module
    decoder: nn.Module
    config: dict[str, Any]
    code_mean: Tensor
    code_factor: Tensor

    def __init__(self, shape: Sequence[int], latent_dim: int, levels: int) -> None:
        super().__init__()
        name = type(self).__name__
        self.shape, self.latent_dim, self.levels = tuple(shape), latent_dim, levels
        self.dim = math.prod(self.shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"{name}: shape={self.shape}, expected (C, H, W)")
        if latent_dim < 1:
            raise ValueError(f"{name}: latent_dim={latent_dim}, expected at least 1")
        if levels < 2:
            raise ValueError(f"{name}: levels={levels}, expected at least 2")
        if not self.prior:
            self.register_buffer("code_mean", torch.zeros(latent_dim))
            self.register_buffer("code_factor", torch.eye(latent_dim))

    def scaled(self, images: Tensor) -> Tensor:
        """Whole numbers (N, *shape) as values in [-1, 1] on the model's device.

        Raises:
            TypeError, ValueError: images of another dtype or shape.
        """
        name = type(self).__name__
        if images.is_floating_point():
            raise TypeError(f"{name}: images have dtype {images.dtype}, expected whole numbers in [0, {self.levels})")
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"{name}: images have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, self.shape))})"
            )
        like = next(self.parameters())
        return images.to(like.device).to(like.dtype) * (2 / (self.levels - 1)) - 1

    def levels_of(self, values: Tensor) -> Tensor:
        """Values in [-1, 1], what is beyond clipped, as the nearest whole numbers in [0, levels).

        Raises:
            FloatingPointError: values that are not numbers; on a GPU an assertion there.
        """
        message = f"{type(self).__name__}: values of images that are not numbers (NaN)"
        if values.is_cuda:
            torch._assert_async((values == values).all(), message)
        elif bool(values.isnan().any()):
            raise FloatingPointError(f"{message}, first in image {int(values.isnan().flatten(1).any(1).nonzero()[0])}")
        return ((values + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def encode(self, images: Tensor) -> Tensor:
        """The code (N, latent_dim) of images (N, *shape)."""
        code: Tensor = self.encoder(self.scaled(images))
        return code

    def decode(self, z: Tensor) -> Tensor:
        """The mean image (N, *shape), values in about [-1, 1], of codes (N, latent_dim)."""
        values: Tensor = self.decoder(z)
        return values

    def player(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of a player."""
        return self.parameters()

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The losses of one phase on a batch of images; ``step`` counts from 0."""
        raise NotImplementedError

    def limits(self, first: dict[str, float]) -> dict[str, float]:
        """The size of each figure above which a run has diverged, by those of its first step.

        That is a hundred times what it began with, or a hundred nats for each number of an image.
        """
        return {name: 100 * max(self.dim, abs(value)) for name, value in first.items()}

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What is reported of held-out images: by name, one number each, (N,). mse: of pixels in [0, 1], mean over an
        image."""
        return {"mse": (self.decode(self.encode(images)) - self.scaled(images)).square().flatten(1).mean(1) / 4}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (N, *shape) behind encoder and decoder, whole numbers."""
        return self.levels_of(self.decode(self.encode(images)))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Fits the Gaussian that codes are sampled from to those of ``images`` (Ghosh et al., arXiv:1903.12436, section
        4).

        Nothing for a model with a prior of its own.
        """
        if self.prior or not len(images):
            return
        codes = torch.cat([self.encode(part) for part in images.split(1024)]).double()
        centred = codes - codes.mean(0)
        covariance = centred.mT @ centred / len(codes)
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12  # a unit that never moves has no variance
        self.code_mean.copy_(codes.mean(0))
        self.code_factor.copy_(
            torch.linalg.cholesky(covariance + ridge * torch.eye(self.latent_dim, device=codes.device))
        )

    def latent(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """``n`` codes (n, latent_dim) from the prior, its deviation times ``temperature``."""
        like = next(self.parameters())
        where = like.device if generator is None else generator.device
        noise = temperature * torch.randn(n, self.latent_dim, generator=generator, device=where, dtype=like.dtype).to(
            like.device
        )
        return noise if self.prior else self.code_mean + noise @ self.code_factor.mT

    @torch.no_grad()
    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, rows: slice | None = None
    ) -> Tensor:
        """The mean images of ``n`` codes from the prior: whole numbers (n, *shape), in evaluation mode.

        With ``rows`` only those of the n, from the codes of all: what one of several processes draws.

        Raises:
            ValueError: a negative ``n`` or ``temperature``.
        """
        if n < 0 or temperature < 0:
            raise ValueError(f"{type(self).__name__}.sample: n={n} and temperature={temperature}, expected at least 0")
        with evaluating(self):
            z = self.latent(n, generator, temperature)
            return self.levels_of(self.decode(z if rows is None else z[rows]))


def squared_error(values: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch of the sum of squares of an image."""
    return F.mse_loss(values, target, reduction="sum") / len(target)
