"""models.VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import losses, ops
from ..reference.discretized_logistic_mixture import mixture
from .base_autoencoder import AutoencoderModel, Losses, Network, decoder_network, encoder_network
from .base_flow import dequantize


class VAE(AutoencoderModel):
    """The variational autoencoder: a diagonal Gaussian posterior, the prior N(0, 1) (Kingma and Welling,
    arXiv:1312.6114).

    The loss is -(E log p(x|z) - beta KL), with one sample of z, from :func:`genfast.ops.diagonal_gaussian`.

    ``likelihood`` p(x|z): "categorical", a softmax over the levels of each pixel; "discretized_logistic", a mixture of
    ``mixtures`` logistics (arXiv:1701.05517); both are probabilities of the images themselves, comparable with the bits
    per dimension of other models. "gaussian": a mean and a variance for each pixel, of images with uniform noise, whose
    density bounds that probability. "bernoulli": of images drawn from the grey values anew for every batch, as in the
    published results on binary MNIST; its bits are those of black and white pixels.

    Args:
        shape: (C, H, W); for the convolutional networks square, a side of ``base`` times a power of two.
        latent_dim: of z.
        levels: of the images.
        likelihood: p(x|z), as above: "categorical", "discretized_logistic", "gaussian" or "bernoulli".
        beta: the KL's weight (Higgins et al., ICLR 2017); 1 for the bound.
        warmup: steps in which the weight grows linearly from 0 (Sonderby et al., arXiv:1602.02282); 0 for none.
        free_bits: nats of each latent dimension that cost nothing (arXiv:1606.04934, appendix C.8), in training alone.
        mixtures: of "discretized_logistic".
        network, hidden, depth, width, base: as :class:`Autoencoder`.

    Raises:
        ValueError: sizes that do not fit, another likelihood or network, or negative weights.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.VAE((1, 8, 8), levels=17, hidden=16)
        >>> bound = model.elbo(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        >>> bool(torch.isclose(bound.elbo, bound.reconstruction - bound.kl))
        True
    """

    prior = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 16,
        levels: int = 256,
        likelihood: Literal["categorical", "discretized_logistic", "gaussian", "bernoulli"] = "discretized_logistic",
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        mixtures: int = 3,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        super().__init__(shape, latent_dim, levels)
        if likelihood not in losses.LIKELIHOODS:
            raise ValueError(
                f"VAE: likelihood={likelihood!r}, expected one of {', '.join(map(repr, losses.LIKELIHOODS))}"
            )
        for name, value in (("beta", beta), ("warmup", warmup), ("free_bits", free_bits)):
            if not value >= 0:
                raise ValueError(f"VAE: {name}={value}, expected at least 0")
        if mixtures < 1 or (likelihood == "discretized_logistic" and self.shape[0] not in (1, 3)):
            raise ValueError(
                f"VAE: mixtures={mixtures} and {self.shape[0]} channels, expected at least 1 and 1 or 3 channels"
            )
        sizes = {"hidden": hidden, "depth": depth, "width": width, "base": base}
        self.config = {
            "shape": self.shape,
            "latent_dim": latent_dim,
            "levels": levels,
            "likelihood": likelihood,
            "beta": beta,
            "warmup": warmup,
            "free_bits": free_bits,
            "mixtures": mixtures,
            "network": network,
        } | sizes
        self.likelihood, self.beta, self.warmup, self.free_bits = likelihood, beta, warmup, free_bits
        channels = self.shape[0]
        out = {
            "categorical": levels * channels,
            "gaussian": 2 * channels,
            "bernoulli": channels,
            "discretized_logistic": mixtures * (10 if channels == 3 else 3),
        }[likelihood]
        self.encoder = encoder_network("VAE", network, self.shape, 2 * latent_dim, **sizes)
        self.decoder = decoder_network("VAE", network, self.shape, latent_dim, out, **sizes)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), (N, latent_dim) each."""
        mean, log_variance = self.encoder(self.scaled(images)).chunk(2, 1)
        return mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean (N, latent_dim)."""
        return self.posterior(images)[0]

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), (N, *shape), values in [-1, 1]."""
        parameters: Tensor = self.decoder(z)
        if self.likelihood == "bernoulli":
            return 2 * parameters.sigmoid() - 1
        if self.likelihood == "gaussian":
            mean: Tensor = parameters.chunk(2, 1)[0].clamp(-1, 1)
            return mean
        if self.likelihood == "categorical":
            grey = torch.linspace(-1, 1, self.levels, dtype=z.dtype, device=z.device).reshape(-1, *(1,) * 3)
            levels: Tensor = parameters.unflatten(1, (self.levels, self.shape[0]))
            return (levels.softmax(1) * grey).sum(1)
        m = mixture(parameters, self.shape[0])
        share, found = m.logits.softmax(1), torch.zeros(len(z), *self.shape, dtype=z.dtype, device=z.device)
        for c in range(self.shape[0]):  # each colour's mean depends on those before
            own = (share * m.means_given(found)[:, c]).sum(1).clamp(-1, 1)
            found = torch.cat([found[:, :c], own[:, None], found[:, c + 1 :]], 1)
        return found

    def _observed(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, float]:
        """What the encoder sees, what the likelihood is of, and what its logarithm is short of that of the images'
        levels."""
        like = next(self.parameters())
        if self.likelihood == "gaussian":  # a density of values in [-1, 1], whose bins are 2 / levels wide
            values = 2 * dequantize(images, self.levels, generator=generator)
            return images, values.to(like.device, like.dtype), self.dim * math.log(2 / self.levels)
        if self.likelihood == "bernoulli":
            where = images.device if generator is None else generator.device
            uniform = torch.rand(images.shape, generator=generator, device=where).to(images.device)
            drawn = uniform * (self.levels - 1) < images
            return drawn.long() * (self.levels - 1), drawn.to(like.device, like.dtype), 0.0
        return images, images.to(like.device).long(), 0.0

    def _log_likelihood(self, target: Tensor, z: Tensor) -> Tensor:
        return losses.log_likelihood(target, self.decoder(z), self.likelihood, levels=self.levels)

    def _bound(self, images: Tensor, generator: torch.Generator | None, beta: float, free_bits: float) -> losses.ELBO:
        seen, target, constant = self._observed(images, generator)
        mean, log_variance = self.posterior(seen)
        z, kl = ops.diagonal_gaussian(mean, log_variance, generator=generator, free_bits=free_bits, reduction="mean")
        return losses.elbo(self._log_likelihood(target, z) + constant, kl, beta=beta)

    def elbo(self, images: Tensor, *, generator: torch.Generator | None = None) -> losses.ELBO:
        """The evidence lower bound of a batch of images, without free bits, in nats; differentiable."""
        return self._bound(images, generator, self.beta, 0.0)

    @torch.no_grad()
    def importance_weighted_bound(
        self, images: Tensor, samples: int = 64, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The tighter bound of ``samples`` samples of z a image, mean over the batch, nats (arXiv:1509.00519, equation
        8)."""
        seen, target, constant = self._observed(images, generator)
        mean, log_variance = self.posterior(seen)
        weights = []
        for _ in range(samples):
            where = mean.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, device=where, dtype=mean.dtype).to(mean.device)
            z = mean + (0.5 * log_variance).exp() * noise
            # log p(z) - log q(z|x), whose constants are the same.
            ratio = 0.5 * (noise.square() + log_variance - z.square()).sum(1)
            weights.append(self._log_likelihood(target, z) + constant + ratio)
        return losses.importance_weighted_bound(torch.stack(weights))

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """Minus the bound, its KL weighted and with free bits."""
        beta = self.beta * (min(1.0, step / self.warmup) if self.warmup else 1.0)
        bound = self._bound(images, generator, beta, self.free_bits)
        shown = {"loss": bound.loss, "reconstruction": bound.reconstruction, "kl": bound.kl}
        return Losses({"autoencoder": bound.loss}, shown)

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, reconstruction and kl of each image in nats, and mse."""
        seen, target, constant = self._observed(images, generator)
        z, kl = ops.diagonal_gaussian(*self.posterior(seen), generator=generator)
        reconstruction = self._log_likelihood(target, z) + constant
        return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl} | super().figures(images)
