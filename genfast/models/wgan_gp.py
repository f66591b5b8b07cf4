"""models.WGANGP: the perceptrons and the residual networks of the gradient penalty's paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from .base_adversarial import AdversarialModel, Recipe
from .blocks import mlp, stages


class ResidualBlock(nn.Module):
    """norm, ReLU, 3 x 3, norm, ReLU, 3 x 3, beside a shortcut; up: nearest before the first, down: mean behind the
    second.

    Without ``first_activation``, for the critic's first block, the input goes to the convolution as it is, and the
    shortcut pools before its 1 x 1 convolution.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        resample: Literal["up", "down"] | None,
        norm: Literal["batch", "layer"] | None,
        first_activation: bool = True,
    ) -> None:
        super().__init__()
        taken, given = channels
        between = given if resample != "down" or not first_activation else taken
        layers: list[nn.Module] = []
        if first_activation:
            layers += [*_norm(norm, taken), nn.ReLU()]
        layers += [nn.Upsample(scale_factor=2)] * (resample == "up") + [_he(nn.Conv2d(taken, between, 3, padding=1))]
        layers += [*_norm(norm, between), nn.ReLU(), _he(nn.Conv2d(between, given, 3, padding=1))]
        layers += [nn.AvgPool2d(2)] * (resample == "down")
        self.main = nn.Sequential(*layers)
        shortcut: list[nn.Module] = [nn.Upsample(scale_factor=2)] * (resample == "up")
        if taken != given or resample is not None:
            shortcut.append(_glorot(nn.Conv2d(taken, given, 1)))
        if resample == "down":
            shortcut.insert(0 if not first_activation else 1, nn.AvgPool2d(2))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.main(x)
        return total


def _norm(kind: Literal["batch", "layer"] | None, channels: int) -> list[nn.Module]:
    if kind is None:
        return []
    # Over all of a sample, with a gain and a bias per channel: the layer normalisation of the released code.
    return [nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(1, channels)]


def _he(module: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def _glorot(module: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.xavier_uniform_(module.weight)
    assert module.bias is not None
    nn.init.zeros_(module.bias)
    return module


def _toy(shape: tuple[int, ...], latent_dim: int, hidden: int, depth: int) -> tuple[nn.Module, nn.Module]:
    """Four layers of ReLU in the released gan_toy.py, with its initial values."""
    found = []
    for taken, given in ((latent_dim, shape[0]), (shape[0], 1)):
        network = nn.Sequential(*mlp([taken, *[hidden] * depth, given], nn.ReLU))
        *inner, last = (m for m in network if isinstance(m, nn.Linear))
        for module in inner:
            _he(module)
        _glorot(last)
        found.append(network)
    found[1].append(nn.Flatten(0))
    return found[0], found[1]


class ResNetGenerator(nn.Sequential):
    """Linear to ``base`` x ``base``, residual blocks that double the side, batch norm, ReLU, 3 x 3, tanh."""

    def __init__(self, name: str, shape: Sequence[int], latent_dim: int, width: int, base: int) -> None:
        blocks = [ResidualBlock((width, width), "up", "batch") for _ in range(stages(name, shape, base))]
        super().__init__(
            _glorot(nn.Linear(latent_dim, width * base * base)),
            nn.Unflatten(1, (width, base, base)),
            *blocks,
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _glorot(nn.Conv2d(width, shape[0], 3, padding=1)),
            nn.Tanh(),
        )


class ResNetCritic(nn.Sequential):
    """Residual blocks down to 8 x 8 (one at least), two more, ReLU, mean over positions, linear; no batch norm."""

    def __init__(self, shape: Sequence[int], width: int, norm: Literal["layer"] | None) -> None:
        down = max(1, round(math.log2(shape[1] / 8)))
        blocks = [ResidualBlock((shape[0], width), "down", norm, first_activation=False)]
        blocks += [ResidualBlock((width, width), "down", norm) for _ in range(down - 1)]
        blocks += [ResidualBlock((width, width), None, norm) for _ in range(2)]
        super().__init__(
            *blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _glorot(nn.Linear(width, 1)), nn.Flatten(0)
        )


class WGANGP(AdversarialModel):
    """The Wasserstein game with a gradient penalty (Gulrajani et al., arXiv:1704.00028).

    For points, the perceptrons of the released gan_toy.py: 2-512-512-512-1, ReLU, a penalty of weight 0.1. For images,
    the residual networks of its CIFAR-10 experiment (appendix F): batch norm in the generator alone; weight 10.

    Args:
        shape: (D,) of points or (C, side, side) of images with values in [-1, 1], side = base times a power of two.
        latent_dim: 2 for points and 128 for images by default.
        hidden: units per hidden layer of the perceptrons.
        depth: hidden layers of the perceptrons.
        width: channels of the residual networks.
        base: side of the generator's smallest map.
        critic_norm: None, or "layer", which does not couple samples.

    Raises:
        ValueError: a shape that no doubling of ``base`` reaches, or another ``critic_norm``.

    Example:
        >>> import torch, genfast
        >>> genfast.models.WGANGP((2,), hidden=16).sample(5).shape
        torch.Size([5, 2])
    """

    recipe = Recipe(
        loss="wasserstein",
        penalty="wgan-gp",
        weight=10.0,
        critic_steps=5,
        generator_lr=2e-4,
        critic_lr=2e-4,
        betas=(0.0, 0.9),
    )
    toy_recipe = replace(recipe, weight=0.1, generator_lr=1e-4, critic_lr=1e-4, betas=(0.5, 0.9))

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int | None = None,
        hidden: int = 512,
        depth: int = 3,
        width: int = 128,
        base: int = 4,
        critic_norm: Literal["layer"] | None = None,
    ) -> None:
        points = len(shape) == 1
        super().__init__(shape, (2 if points else 128) if latent_dim is None else latent_dim)
        if critic_norm not in (None, "layer"):
            raise ValueError(
                f"WGANGP: critic_norm={critic_norm!r}, expected None or 'layer' (batch norm couples samples)"
            )
        self.config = {
            "shape": self.shape,
            "latent_dim": self.latent_dim,
            "hidden": hidden,
            "depth": depth,
            "width": width,
            "base": base,
            "critic_norm": critic_norm,
        }
        if points:
            self.recipe = self.toy_recipe
            self.generator, self.critic = _toy(self.shape, self.latent_dim, hidden, depth)
        else:
            self.generator = ResNetGenerator("WGANGP", self.shape, self.latent_dim, width, base)
            self.critic = ResNetCritic(self.shape, width, critic_norm)
