"""models.DCGAN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from .adversarial import AdversarialModel, Recipe, stages


def dcgan_networks(
    name: str, shape: Sequence[int], latent_dim: int, width: int, base: int, kernel_size: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """(generator, critic): transposed convolutions of stride 2 from ``base`` x ``base`` up, and convolutions back down."""
    if kernel_size not in (4, 5):
        raise ValueError(f"{name}: kernel_size={kernel_size}, expected 4 (padding 1) or 5 (padding 2)")
    number = stages(name, shape, base)
    channels = [width << i for i in reversed(range(number))]  # 1024, 512, 256, 128 for 64 x 64 and width 128
    same: dict[str, Any] = {"kernel_size": kernel_size, "stride": 2, "padding": (kernel_size - 1) // 2, "bias": False}
    up = same | {"output_padding": kernel_size - 4}
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(latent_dim, channels[0], base, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(),
    ]  # fmt: skip
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


class DCGAN(AdversarialModel):
    """Strided convolutions, batch normalisation, ReLU and LeakyReLU(0.2), tanh (Radford et al., arXiv:1511.06434, figure 1).

    With the paper's ``shape`` (3, 64, 64) and ``width`` 128: z of 100 -> 1024 x 4 x 4 -> 512 x 8 x 8 -> 256 x 16 x 16 ->
    128 x 32 x 32 -> 3 x 64 x 64, and the critic back down. Other sizes have as many stages as they need. Weights start from
    N(0, 0.02). With kernel_size 4, the state_dicts of both parts are those of PyTorch's DCGAN example (there width is 64).

    Args:
        shape: (C, side, side), side = base times a power of two. Images have values in [-1, 1].
        latent_dim: of z ~ N(0, 1).
        width: channels of the widest map but one; each halving of the side doubles them.
        base: side of the smallest map.
        kernel_size: 4, or the paper's 5.

    Raises:
        ValueError: a shape that no doubling of ``base`` reaches, or another kernel size.

    Example:
        >>> import torch, genfast
        >>> genfast.models.DCGAN((3, 32, 32), width=8).sample(2).shape
        torch.Size([2, 3, 32, 32])
    """

    recipe = Recipe(loss="nonsaturating", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))

    def __init__(
        self, shape: Sequence[int] = (3, 64, 64), *, latent_dim: int = 100, width: int = 128, base: int = 4,
        kernel_size: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(shape, latent_dim)
        self.config = {
            "shape": self.shape, "latent_dim": latent_dim, "width": width, "base": base, "kernel_size": kernel_size,
        }  # fmt: skip
        self.generator, self.critic = dcgan_networks(type(self).__name__, self.shape, latent_dim, width, base, kernel_size)
