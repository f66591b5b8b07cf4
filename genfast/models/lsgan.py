"""models.LSGAN."""

from __future__ import annotations

from collections.abc import Sequence

from .adversarial import AdversarialModel, Recipe
from .dcgan import dcgan_networks
from .gan import mlp_networks


class PointsOrImages(AdversarialModel):
    """Perceptrons for points, the DCGAN networks for images: the models that differ from those in their game alone."""

    def __init__(
        self, shape: Sequence[int], *, latent_dim: int | None = None, hidden: int = 256, depth: int = 3, width: int = 64,
        base: int = 4, kernel_size: int = 4,
    ) -> None:  # fmt: skip
        points = len(shape) == 1
        super().__init__(shape, (2 if points else 100) if latent_dim is None else latent_dim)
        self.config = {
            "shape": self.shape, "latent_dim": self.latent_dim, "hidden": hidden, "depth": depth, "width": width,
            "base": base, "kernel_size": kernel_size,
        }  # fmt: skip
        if points:
            self.generator, self.critic = mlp_networks(self.shape, self.latent_dim, hidden, depth)
        else:
            self.generator, self.critic = dcgan_networks(
                type(self).__name__, self.shape, self.latent_dim, width, base, kernel_size
            )


class LSGAN(PointsOrImages):
    """Least squares in place of the cross-entropy (Mao et al., arXiv:1611.04076), on perceptrons or the DCGAN networks.

    Args:
        shape: (D,) of points or (C, side, side) of images with values in [-1, 1].
        latent_dim: 2 for points and 100 for images by default.
        hidden, depth: of the perceptrons.
        width, base, kernel_size: of the convolutional networks, as in :class:`DCGAN`.

    Example:
        >>> import torch, genfast
        >>> genfast.models.LSGAN((1, 8, 8), width=8).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    recipe = Recipe(loss="lsgan", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))
