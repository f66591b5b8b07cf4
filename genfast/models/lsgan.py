"""models.LSGAN."""

from __future__ import annotations

from .base_adversarial import PointsOrImages, Recipe


class LSGAN(PointsOrImages):
    """Least squares in place of the cross-entropy (Mao et al., arXiv:1611.04076), on perceptrons or the DCGAN networks.

    Args:
        shape: (D,) of points or (C, side, side) of images with values in [-1, 1].
        latent_dim: 2 for points and 100 for images by default.
        hidden: units per hidden layer of the perceptrons.
        depth: hidden layers of the perceptrons.
        width, base, kernel_size: as in :class:`DCGAN`, of the convolutional networks.

    Example:
        >>> import torch, genfast
        >>> genfast.models.LSGAN((1, 8, 8), width=8).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    recipe = Recipe(loss="lsgan", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))
