"""Blocks and pairs of networks that several adversarial models and autoencoders are made of."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Linear layers of these sizes with an ``activation()`` between them."""
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for taken, given in zip(sizes[1:-1], sizes[2:]):
        layers += [activation(), nn.Linear(taken, given)]
    return layers


def leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


def stages(name: str, shape: Sequence[int], base: int) -> int:
    """How often ``base`` x ``base`` is doubled up to the side of images of ``shape``; an error where it cannot be."""
    if len(shape) != 3 or shape[1] != shape[2] or base < 1:
        raise ValueError(
            f"{name}: shape={tuple(shape)} and base={base}, expected square images (C, side, side) and base >= 1"
        )
    number = int(math.log2(max(shape[1] / base, 1)))
    if number < 1 or base << number != shape[1]:
        raise ValueError(f"{name}: shape={tuple(shape)}, expected a side of {base} (base) times 2, 4, 8, ...")
    return number


def mlp_networks(shape: Sequence[int], latent_dim: int, hidden: int, depth: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, critic) of ``depth`` hidden layers each; tanh behind a generator of images, none behind one of
    points."""
    dim = math.prod(shape)
    sizes = [hidden] * depth
    last: list[nn.Module] = [nn.Tanh(), nn.Unflatten(1, tuple(shape))] if len(shape) > 1 else []
    generator = nn.Sequential(*mlp([latent_dim, *sizes, dim], nn.ReLU), *last)
    critic = nn.Sequential(nn.Flatten(), *mlp([dim, *sizes, 1], leaky_relu), nn.Flatten(0))
    return generator, critic


def dcgan_networks(
    name: str, shape: Sequence[int], latent_dim: int, width: int, base: int, kernel_size: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, critic): transposed convolutions of stride 2 from ``base`` x ``base`` up, and convolutions back
    down."""
    if kernel_size not in (4, 5):
        raise ValueError(f"{name}: kernel_size={kernel_size}, expected 4 (padding 1) or 5 (padding 2)")
    number = stages(name, shape, base)
    channels = [width << i for i in reversed(range(number))]  # 1024, 512, 256, 128 for 64 x 64 and width 128
    same: dict[str, Any] = {"kernel_size": kernel_size, "stride": 2, "padding": (kernel_size - 1) // 2, "bias": False}
    up = same | {"output_padding": kernel_size - 4}
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(latent_dim, channels[0], base, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
    ]
    for taken, given in zip(channels[:-1], channels[1:]):
        layers += [nn.ConvTranspose2d(taken, given, **up), nn.BatchNorm2d(given), nn.ReLU()]
    layers += [nn.ConvTranspose2d(channels[-1], shape[0], **up), nn.Tanh()]
    generator = nn.Sequential(OrderedDict(unflatten=nn.Unflatten(1, (latent_dim, 1, 1)), main=nn.Sequential(*layers)))
    channels.reverse()
    layers = [nn.Conv2d(shape[0], channels[0], **same), nn.LeakyReLU(0.2)]
    for taken, given in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv2d(taken, given, **same), nn.BatchNorm2d(given), nn.LeakyReLU(0.2)]
    layers.append(nn.Conv2d(channels[-1], 1, base, bias=False))
    critic = nn.Sequential(OrderedDict(main=nn.Sequential(*layers), flatten=nn.Flatten(0)))
    for module in (*generator.modules(), *critic.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return generator, critic
