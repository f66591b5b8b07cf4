"""models.WGAN."""

from __future__ import annotations

from .base_adversarial import PointsOrImages, Recipe


class WGAN(PointsOrImages):
    """The Wasserstein game with clipped weights (Arjovsky et al., arXiv:1701.07875, algorithm 1).

    Five updates of the critic for one of the generator, weights clipped to [-0.01, 0.01], RMSProp at 5e-5, no momentum.

    Args:
        shape: (D,) of points or (C, side, side) of images with values in [-1, 1].
        latent_dim: 2 for points and 100 for images by default.
        hidden: units per hidden layer of the perceptrons.
        depth: hidden layers of the perceptrons.
        width, base, kernel_size: as in :class:`DCGAN`, of the convolutional networks.

    Example:
        >>> import torch, genfast
        >>> genfast.models.WGAN((2,), hidden=16).critic(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    recipe = Recipe(
        loss="wasserstein", clip=0.01, critic_steps=5, optimizer="rmsprop", generator_lr=5e-5, critic_lr=5e-5
    )
