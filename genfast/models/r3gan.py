"""models.R3GAN: a modern baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base_adversarial import AdversarialModel, Recipe
from .blocks import stages

GAIN = math.sqrt(2 / (1 + 0.2**2))  # of LeakyReLU(0.2)


def _scaled(module: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Module:
    """Weights from N(0, gain^2 / fan-in), biases 0."""
    nn.init.normal_(module.weight, 0.0, gain / math.sqrt(module.weight[0].numel()))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class GroupedBlock(nn.Module):
    """x + 1 x 1, LeakyReLU, grouped 3 x 3, LeakyReLU, 1 x 1 (figure 2): an inverted bottleneck without normalisation.

    ``depth`` is the number of blocks in the network: the initial weights shrink with it, and the last starts at zero
    (fix-up initialisation, section 3.2), so that variance does not grow from block to block.
    """

    def __init__(self, channels: int, expansion: int, group_size: int, depth: int) -> None:
        super().__init__()
        wide, gain = channels * expansion, GAIN * depth**-0.25
        self.main = nn.Sequential(
            _scaled(nn.Conv2d(channels, wide, 1), gain),
            nn.LeakyReLU(0.2),
            _scaled(nn.Conv2d(wide, wide, 3, padding=1, groups=wide // group_size), gain),
            nn.LeakyReLU(0.2),
            _scaled(nn.Conv2d(wide, channels, 1, bias=False), 0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.main(x)
        return total


class Halve(nn.Sequential):
    """The filter (1, 3, 3, 1) / 8 in both directions with stride 2, as three means of two: (1, 1) * (1, 1) * (1, 1)."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(2, 1, padding=1), nn.AvgPool2d(2, 1), nn.AvgPool2d(2))


class Basis(nn.Module):
    """A learned map (channels, base, base) scaled by a linear function of z."""

    def __init__(self, latent_dim: int, channels: int, base: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(channels, base, base))
        self.linear = _scaled(nn.Linear(latent_dim, channels, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        scaled: Tensor = self.basis * self.linear(z)[:, :, None, None]
        return scaled


class R3GAN(AdversarialModel):
    """Relativistic pairing, R1 and R2, and residual networks without normalisation (Huang et al., arXiv:2501.05441).

    Grouped inverted bottlenecks, LeakyReLU(0.2), bilinear up- and downsampling, a learned 4 x 4 basis at the narrow end
    of both networks, no tanh. The critic is piecewise linear. ``weight`` is the gamma of both penalties, gamma / 2 E
    |g|^2; the paper has 0.05 for CIFAR-10 (falling to 0.005) and 150 for 256 x 256 faces: it grows with the number of
    pixels.

    Args:
        shape: (C, side, side) of images with values in [-1, 1], side = base times a power of two.
        latent_dim: of z ~ N(0, 1).
        width: channels of every map; width times expansion is a multiple of group_size.
        blocks: per size of map.
        expansion: of the channels inside a block.
        group_size: channels per group of the 3 x 3 convolutions.
        base: side of the smallest map.

    Raises:
        ValueError: a shape that no doubling of ``base`` reaches, or channels that no group divides.

    Example:
        >>> import torch, genfast
        >>> genfast.models.R3GAN((3, 16, 16), width=8).sample(2).shape
        torch.Size([2, 3, 16, 16])
    """

    recipe = Recipe(
        loss="relativistic", penalty="r1r2", weight=0.05, generator_lr=2e-4, critic_lr=2e-4, betas=(0.0, 0.99)
    )

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 64,
        width: int = 96,
        blocks: int = 1,
        expansion: int = 2,
        group_size: int = 16,
        base: int = 4,
    ) -> None:
        super().__init__(shape, latent_dim)
        number = stages("R3GAN", self.shape, base)
        if group_size < 1 or (width * expansion) % group_size:
            raise ValueError(
                f"R3GAN: width * expansion = {width * expansion} is not a multiple of group_size={group_size}"
            )
        if blocks < 1:
            raise ValueError(f"R3GAN: blocks={blocks}, expected at least 1")
        self.config = {
            "shape": self.shape,
            "latent_dim": latent_dim,
            "width": width,
            "blocks": blocks,
            "expansion": expansion,
            "group_size": group_size,
            "base": base,
        }
        depth = blocks * (number + 1)

        def stage() -> list[nn.Module]:
            return [GroupedBlock(width, expansion, group_size, depth) for _ in range(blocks)]

        up: list[nn.Module] = [Basis(latent_dim, width, base), *stage()]
        down: list[nn.Module] = [_scaled(nn.Conv2d(shape[0], width, 1, bias=False))]
        for _ in range(number):
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), *stage()]
            down += [*stage(), Halve()]
        self.generator = nn.Sequential(*up, _scaled(nn.Conv2d(width, shape[0], 1, bias=False)))
        self.critic = nn.Sequential(
            *down,
            *stage(),
            _scaled(nn.Conv2d(width, width, base, groups=width, bias=False)),
            nn.Flatten(),
            _scaled(nn.Linear(width, 1, bias=False)),
            nn.Flatten(0),
        )
