"""models.ConditionalGAN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .base_adversarial import AdversarialModel, Recipe
from .blocks import leaky_relu, mlp


class LabelledGenerator(nn.Module):
    """(z, labels) to samples: the embedded label beside z."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, classes: int, embedding: int, sizes: list[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        last: list[nn.Module] = [nn.Tanh(), nn.Unflatten(1, shape)] if len(shape) > 1 else []
        self.main = nn.Sequential(*mlp([latent_dim + embedding, *sizes, math.prod(shape)], nn.ReLU), *last)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        drawn: Tensor = self.main(torch.cat([z, self.embedding(labels)], 1))
        return drawn


class ConcatenatingCritic(nn.Module):
    """The embedded label beside x (arXiv:1411.1784, figure 1)."""

    def __init__(self, dim: int, classes: int, embedding: int, sizes: list[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.main = nn.Sequential(*mlp([dim + embedding, *sizes, 1], leaky_relu), nn.Flatten(0))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.main(torch.cat([x.flatten(1), self.embedding(labels)], 1))
        return logits


class ProjectingCritic(nn.Module):
    """psi(phi(x)) + <embedding(label), phi(x)> (arXiv:1802.05637, eq. 3)."""

    def __init__(self, dim: int, classes: int, sizes: list[int]) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Flatten(), *mlp([dim, *sizes], leaky_relu), nn.LeakyReLU(0.2))
        self.logit = nn.Linear(sizes[-1], 1)
        self.embedding = nn.Embedding(classes, sizes[-1])
        nn.init.normal_(self.embedding.weight, 0.0, sizes[-1] ** -0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.main(x)
        logits: Tensor = self.logit(features).flatten() + (self.embedding(labels) * features).sum(1)
        return logits


class ConditionalGAN(AdversarialModel):
    """Generator and critic that see the label (Mirza and Osindero, arXiv:1411.1784), as perceptrons.

    Args:
        shape: (D,) of points or (C, H, W) of images with values in [-1, 1].
        classes: labels are int64 in [0, classes).
        latent_dim: of z ~ N(0, 1).
        hidden: units per hidden layer.
        depth: hidden layers.
        embedding: of a label, beside z, and beside x in the critic.
        conditioning: of the critic, "concatenate" as in the paper or "projection" (Miyato and Koyama,
            arXiv:1802.05637).

    Raises:
        ValueError: another ``conditioning``.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.ConditionalGAN((1, 8, 8), classes=10, hidden=16)
        >>> model.sample(3, context=torch.tensor([7, 7, 7])).shape
        torch.Size([3, 1, 8, 8])
    """

    recipe = Recipe(loss="nonsaturating", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))

    def __init__(
        self,
        shape: Sequence[int],
        *,
        classes: int,
        latent_dim: int = 64,
        hidden: int = 256,
        depth: int = 2,
        embedding: int = 32,
        conditioning: Literal["concatenate", "projection"] = "concatenate",
    ) -> None:
        super().__init__(shape, latent_dim, classes)
        if conditioning not in ("concatenate", "projection"):
            raise ValueError(f"ConditionalGAN: conditioning={conditioning!r}, expected 'concatenate' or 'projection'")
        self.config = {
            "shape": self.shape,
            "classes": classes,
            "latent_dim": latent_dim,
            "hidden": hidden,
            "depth": depth,
            "embedding": embedding,
            "conditioning": conditioning,
        }
        sizes, dim = [hidden] * depth, math.prod(self.shape)
        self.generator = LabelledGenerator(self.shape, latent_dim, classes, embedding, sizes)
        if conditioning == "projection":
            self.critic = ProjectingCritic(dim, classes, sizes)
        else:
            self.critic = ConcatenatingCritic(dim, classes, embedding, sizes)
