"""models.Autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base_autoencoder import AutoencoderModel, Losses, Network, decoder_network, encoder_network, squared_error


class Autoencoder(AutoencoderModel):
    """An encoder and a decoder that minimise the squared error of the image (Hinton and Salakhutdinov, Science 2006).

    It has no prior: samples come from a Gaussian fitted to the codes of the training images.

    Args:
        shape: (C, H, W); for the convolutional networks square, a side of ``base`` times a power of two.
        latent_dim: of the code.
        levels: of the images.
        network: "perceptron" or "convolutional", each way: ReLU layers, or convolutions of stride 2.
        hidden: units per layer of the perceptrons.
        depth: hidden layers of the perceptrons.
        width: channels of the convolutional networks, which double with every halving of the side.
        base: side of the smallest map of the convolutional networks.

    Raises:
        ValueError: sizes that do not fit, or another network.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.Autoencoder((1, 8, 8), levels=17, hidden=16)
        >>> model.reconstruct(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 16,
        levels: int = 256,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        super().__init__(shape, latent_dim, levels)
        sizes = {"hidden": hidden, "depth": depth, "width": width, "base": base}
        self.config = {"shape": self.shape, "latent_dim": latent_dim, "levels": levels, "network": network} | sizes
        name = type(self).__name__
        self.encoder = encoder_network(name, network, self.shape, latent_dim, **sizes)
        self.decoder = decoder_network(name, network, self.shape, latent_dim, self.shape[0], **sizes)

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The squared error, summed over an image."""
        target = self.scaled(images)
        loss = squared_error(self.decoder(self.encoder(target)), target)
        return Losses({"autoencoder": loss}, {"loss": loss})
