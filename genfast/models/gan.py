"""models.GAN: the first one, two multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

from .base_adversarial import AdversarialModel, Recipe
from .blocks import mlp_networks


class GAN(AdversarialModel):
    """Two multilayer perceptrons in the non-saturating game (Goodfellow et al., arXiv:1406.2661).

    The generator has ReLU units; the critic has LeakyReLU in place of the paper's maxout and dropout, and gives logits.

    Args:
        shape: (D,) of points or (C, H, W) of images, whose values are in [-1, 1].
        latent_dim: of z ~ N(0, 1).
        hidden: units per hidden layer.
        depth: hidden layers.

    Example:
        >>> import torch, genfast
        >>> genfast.models.GAN((1, 8, 8), hidden=16).sample(4).shape
        torch.Size([4, 1, 8, 8])
    """

    recipe = Recipe(loss="nonsaturating", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))

    def __init__(self, shape: Sequence[int], *, latent_dim: int = 64, hidden: int = 256, depth: int = 2) -> None:
        super().__init__(shape, latent_dim)
        self.config = {"shape": self.shape, "latent_dim": latent_dim, "hidden": hidden, "depth": depth}
        self.generator, self.critic = mlp_networks(self.shape, latent_dim, hidden, depth)
