"""models.GAN: the first one, two multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .adversarial import AdversarialModel, Recipe, leaky_relu, mlp


def mlp_networks(shape: Sequence[int], latent_dim: int, hidden: int, depth: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, critic) of ``depth`` hidden layers each; tanh behind a generator of images, none behind one of points."""
    dim = math.prod(shape)
    sizes = [hidden] * depth
    last: list[nn.Module] = [nn.Tanh(), nn.Unflatten(1, tuple(shape))] if len(shape) > 1 else []
    generator = nn.Sequential(*mlp([latent_dim, *sizes, dim], nn.ReLU), *last)
    critic = nn.Sequential(nn.Flatten(), *mlp([dim, *sizes, 1], leaky_relu), nn.Flatten(0))
    return generator, critic


class GAN(AdversarialModel):
    """Two multilayer perceptrons in the non-saturating game (Goodfellow et al., arXiv:1406.2661).

    The generator has ReLU units; the critic has LeakyReLU in place of the paper's maxout and dropout, and gives logits.

    Args:
        shape: (D,) of points or (C, H, W) of images, whose values are in [-1, 1].
        latent_dim: of z ~ N(0, 1).
        hidden, depth: units per hidden layer, and how many layers.

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
