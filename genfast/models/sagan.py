"""models.SAGAN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn.spectral_norm import spectral_norm
from .base_adversarial import AdversarialModel, Recipe
from .blocks import stages


def _conv(taken: int, given: int, kernel_size: int, bias: bool = True) -> nn.Module:
    module = nn.Conv2d(taken, given, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.xavier_uniform_(module.weight)
    return spectral_norm(module)


def _linear(taken: int, given: int) -> nn.Module:
    module = nn.Linear(taken, given)
    nn.init.xavier_uniform_(module.weight)
    return spectral_norm(module)


class SelfAttention2d(nn.Module):
    """x + gamma o(softmax(theta^T phi) g), gamma = 0 at first, in the released form (Zhang et al., arXiv:1805.08318).

    theta and phi have C/8 channels, g has C/2; phi and g are max-pooled 2 x 2, so every position attends to a quarter
    of the positions. The paper's own equations have neither the pooling nor C/2. Maps (N, C, H, W), H and W at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        few, half = max(1, channels // 8), max(1, channels // 2)
        self.theta, self.phi = _conv(channels, few, 1, bias=False), _conv(channels, few, 1, bias=False)
        self.g, self.o = _conv(channels, half, 1, bias=False), _conv(half, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = self.theta(x).flatten(2), self.pool(self.phi(x)).flatten(2), self.pool(self.g(x)).flatten(2)
        attention = torch.softmax(theta.transpose(1, 2) @ phi, -1)  # (N, positions, a quarter of them)
        mixed = (g @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        total: Tensor = x + self.gamma * self.o(mixed)
        return total


class ConditionalBatchNorm2d(nn.Module):
    """(1 + gain(label)) batchnorm(x) + bias(label); plain batch norm without classes."""

    def __init__(self, channels: int, classes: int | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=classes is None)
        self.affine = None if classes is None else nn.Embedding(classes, 2 * channels)
        if self.affine is not None:
            nn.init.zeros_(self.affine.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        normal: Tensor = self.norm(x)
        if self.affine is None:
            return normal
        gain, bias = self.affine(labels)[:, :, None, None].chunk(2, 1)
        shifted: Tensor = normal * (1 + gain) + bias
        return shifted


class GeneratorBlock(nn.Module):
    """norm, ReLU, twice as large, 3 x 3, norm, ReLU, 3 x 3, beside a shortcut that grows the same way."""

    def __init__(self, taken: int, given: int, classes: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm2d(taken, classes), ConditionalBatchNorm2d(given, classes)
        self.conv1, self.conv2 = _conv(taken, given, 3), _conv(given, given, 3)
        self.shortcut = _conv(taken, given, 1)
        self.up, self.relu = nn.Upsample(scale_factor=2), nn.ReLU()

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.conv1(self.up(self.relu(self.norm1(x, labels))))
        total: Tensor = self.shortcut(self.up(x)) + self.conv2(self.relu(self.norm2(h, labels)))
        return total


class CriticBlock(nn.Module):
    """ReLU (not in the first), 3 x 3, ReLU, 3 x 3, mean of 2 x 2 (not in the last), beside a shortcut."""

    def __init__(self, taken: int, given: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        pool: list[nn.Module] = [nn.AvgPool2d(2)] if down else []
        start: list[nn.Module] = [] if first else [nn.ReLU()]
        self.main = nn.Sequential(*start, _conv(taken, given, 3), nn.ReLU(), _conv(given, given, 3), *pool)
        self.shortcut = nn.Sequential(_conv(taken, given, 1), *pool) if down or taken != given else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.main(x)
        return total


class SAGANGenerator(nn.Module):
    def __init__(
        self, shape: Sequence[int], latent_dim: int, classes: int | None, width: int, base: int, number: int
    ) -> None:
        super().__init__()
        channels = [width << i for i in reversed(range(number + 1))]
        self.start = nn.Sequential(
            _linear(latent_dim, channels[0] * base * base), nn.Unflatten(1, (channels[0], base, base))
        )
        self.blocks = nn.ModuleList(GeneratorBlock(t, g, classes) for t, g in zip(channels[:-1], channels[1:]))
        self.attention = SelfAttention2d(channels[-2])  # where maps have half the side of the images
        self.end = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, shape[0], 3), nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.start(z)
        for block in list(self.blocks)[:-1]:
            x = block(x, labels)
        drawn: Tensor = self.end(self.blocks[-1](self.attention(x), labels))
        return drawn


class SAGANCritic(nn.Module):
    def __init__(self, shape: Sequence[int], classes: int | None, width: int, number: int) -> None:
        super().__init__()
        channels = [width << i for i in range(number)]
        self.main = nn.Sequential(
            CriticBlock(shape[0], width, down=True, first=True),
            SelfAttention2d(width),
            *(CriticBlock(t, g, down=True) for t, g in zip(channels[:-1], channels[1:])),
            CriticBlock(channels[-1], channels[-1], down=False),
            nn.ReLU(),
        )
        self.logit = _linear(channels[-1], 1)
        self.embedding: nn.Module | None = None
        if classes is not None:
            table = nn.Embedding(classes, channels[-1])
            nn.init.xavier_uniform_(table.weight)
            self.embedding = spectral_norm(table)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        features = self.main(x).sum((2, 3))
        logits: Tensor = self.logit(features).flatten()
        return logits if self.embedding is None else logits + (self.embedding(labels) * features).sum(1)


class SAGAN(AdversarialModel):
    """Residual networks with self-attention at half the images' side (Zhang et al., arXiv:1805.08318).

    Hinge loss, spectral norm in both networks, one update of each, learning rates 1e-4 for the generator and 4e-4 for
    the critic, Adam (0, 0.9). With ``classes``, conditional batch norm in the generator and projection in the critic.

    Args:
        shape: (C, side, side) of images with values in [-1, 1], side = base times a power of two, at least 4.
        classes: labels are int64 in [0, classes); None for a model without labels.
        latent_dim: of z ~ N(0, 1).
        width: channels of the largest maps; each halving of the side doubles them.
        base: side of the smallest map.

    Example:
        >>> import torch, genfast
        >>> genfast.models.SAGAN((3, 16, 16), width=4).sample(2).shape
        torch.Size([2, 3, 16, 16])
    """

    recipe = Recipe(loss="hinge", generator_lr=1e-4, critic_lr=4e-4, betas=(0.0, 0.9))

    def __init__(
        self, shape: Sequence[int], *, classes: int | None = None, latent_dim: int = 128, width: int = 64, base: int = 4
    ) -> None:
        super().__init__(shape, latent_dim, classes)
        number = stages("SAGAN", self.shape, base)
        if self.shape[1] < 4:
            raise ValueError(f"SAGAN: shape={self.shape}, expected a side of at least 4 for the attention's pooling")
        self.config = {"shape": self.shape, "classes": classes, "latent_dim": latent_dim, "width": width, "base": base}
        self.generator = SAGANGenerator(self.shape, latent_dim, classes, width, base, number)
        self.critic = SAGANCritic(self.shape, classes, width, number)
